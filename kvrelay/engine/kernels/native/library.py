"""The compiled library, called through ctypes, which lets other Python threads run meanwhile."""

import ctypes
import functools
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

__all__ = ["Step", "load_library"]

log = logging.getLogger(__name__)
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Step(ctypes.Structure):
    """`KvrelayStep` in kernels.h."""

    _fields_ = (
        ("rows", _POINTER),
        ("query_starts", _POINTER),
        ("context_lengths", _POINTER),
        ("block_tables", _POINTER),
        ("num_tokens", _INT),
        ("num_chunks", _INT),
        ("table_width", _INT),
        ("block_size", _INT),
        ("block_stride", _INT),
        ("num_kv_heads", _INT),
        ("head_dim", _INT),
        ("num_threads", _INT),
    )


_STEP = ctypes.POINTER(Step)
_SIGNATURES = {
    "kvrelay_add_rms_norm": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _INT),
    "kvrelay_gated_silu": (_POINTER, _POINTER, _INT, _INT, _INT),
    "kvrelay_store": (_STEP, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER),
    "kvrelay_rotate_and_store": (
        *(_STEP, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    ),
    "kvrelay_attend": (_STEP, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _FLOAT, _FLOAT),
    "kvrelay_int8_linear": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT),
}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library for this machine's instructions; None, with a line in the log, if there is none."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    file = Path(__file__).with_name(f"{level}{EXTENSION_SUFFIXES[0]}")
    try:
        library = ctypes.CDLL(str(file))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        log.warning("no compiled kernels for this machine, so torch computes all, which is slower: %s", error)
        return None
    return library
