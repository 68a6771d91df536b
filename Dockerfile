# One image for every process of kvrelay: docker build --target cpu -t kvrelay:cpu .    or cuda
ARG BASE=python:3.11-slim-bookworm
# The same with a compiler, for the kernels in C++.
ARG BUILDER=python:3.11-bookworm

FROM ${BASE} AS requirements
COPY pyproject.toml .
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /requirements.txt

FROM ${BASE} AS dependencies
# Another package index besides pip's own, such as one with CPU builds of PyTorch, which are far smaller.
ARG PIP_EXTRA_INDEX_URL=""
ENV PATH=/opt/kvrelay/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/kvrelay
COPY constraints.txt /
# PyTorch on its own and first, lest another package's range of versions chooses another build.
RUN pip install --constraint /constraints.txt torch
COPY --from=requirements /requirements.txt /
RUN pip install --constraint /constraints.txt --requirement /requirements.txt

FROM ${BUILDER} AS build
WORKDIR /src
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --disable-pip-version-check --no-deps --wheel-dir /wheels .

FROM ${BASE} AS cpu
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin kvrelay \
    && install --directory --owner kvrelay --mode 700 /run/kvrelay /var/cache/huggingface
# The dependencies are a layer of their own, which stays as it is when only kvrelay changes.
COPY --from=dependencies /opt/kvrelay /opt/kvrelay
COPY --from=build /wheels /wheels
RUN /opt/kvrelay/bin/pip install --no-deps --no-index --disable-pip-version-check /wheels/*.whl
# Every process listens on the same port, so that one health check fits all.
ENV PATH=/opt/kvrelay/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    KVRELAY_PORT=50051 \
    KVRELAY_WORKER_PORT=50051 \
    KVRELAY_KEY_FILE=/run/kvrelay/cluster.key
USER kvrelay
EXPOSE 50051
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-m", "kvrelay.rpc.probe", "localhost:50051"]
ENTRYPOINT ["kvrelay"]
CMD ["--help"]

FROM cpu AS cuda
RUN python3 -c "import sys, torch; sys.exit(torch.version.cuda is None and 'this PyTorch is a CPU build')"
# Triton compiles when a worker starts: it needs a C compiler, and a folder from which it may load what it has compiled.
USER root
RUN apt-get update -q && apt-get install -yq --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner kvrelay --mode 700 /var/cache/triton
USER kvrelay
ENV TRITON_CACHE_DIR=/var/cache/triton NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
