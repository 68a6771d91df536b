"""Builds the compiled kernels; all else about the package stands in pyproject.toml.

They are shared libraries that ctypes loads, one for each level of instructions, since who installs may build for
another machine (an image, say). Without a compiler the package installs all the same, and computes with torch alone.
"""

import platform

from setuptools import Extension, setup

FOLDER = "kvrelay/engine/kernels/native"
LEVELS = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3"} if platform.machine() == "x86_64" else {}

setup(
    ext_modules=[
        Extension(
            f"{FOLDER.replace('/', '.')}.{level}",
            sources=[f"{FOLDER}/{name}.cpp" for name in ("attention", "int8", "rows")],
            depends=[f"{FOLDER}/kernels.h", f"{FOLDER}/vectors.h"],
            # Not linked with an OpenMP library: torch's own is in the process, and two would fight for the cores.
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi", flag],
            optional=True,
        )
        for level, flag in LEVELS.items()
    ]
)
