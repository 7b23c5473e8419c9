# syntax=docker/dockerfile:1
# Two images:
#   docker build --target server -t sharpness-probe-server .   HTTP server and commands, no torch
#   docker build --target worker -t sharpness-probe-worker .   worker, with CUDA torch
# No key, password or token goes into either: they are given when a container starts.

# The Python that constraints.txt was tested with.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/probe/bin:$PATH
WORKDIR /src
# --group asks for pip 25.1, --build-constraint for 25.3.
RUN python -m venv /opt/probe && pip install --no-cache-dir pip==26.3
COPY constraints.txt pyproject.toml README.md LICENSE ./

FROM build AS wheel
COPY probe probe
COPY server server
COPY clients clients
RUN pip wheel --no-deps --build-constraint constraints.txt --wheel-dir /dist .

FROM build AS server-packages
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --group server

FROM build AS worker-packages
# A CUDA that PyTorch builds its wheels for: cu130 (CUDA 13.0) asks for driver 580 or later;
# cu126 for older drivers and cards; cpu for a worker without a GPU.
ARG CUDA=cu130
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt \
      --extra-index-url "https://download.pytorch.org/whl/${CUDA}" \
      "torch==$(sed -n 's/^torch==//p' constraints.txt)+${CUDA}"
# Everything else, with a package of nothing in place of ours: this layer, by far the largest,
# stays the same when only the code changes.
ARG EXTRAS=continual,deepspeed,otel,postgres
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir probe server clients && touch probe/__init__.py server/__init__.py clients/__init__.py \
    && pip install -c constraints.txt --build-constraint constraints.txt ".[${EXTRAS}]" \
    && pip uninstall --yes sharpness-probe

FROM python:${PYTHON} AS base
# tini: process 1 that reaps orphans and passes signals on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 probe \
    && useradd --uid 10001 --gid probe --home-dir /var/cache/probe --no-create-home probe \
    && install --directory --owner probe --group probe /var/lib/probe /var/cache/probe \
      /run/metrics-key /checkpoints
ENV PATH=/opt/probe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PROBE_DATA_DIR=/var/lib/probe \
    PROBE_CACHE_DIR=/var/cache/probe \
    PROBE_ROOTS=/checkpoints \
    HOME=/var/cache/probe \
    HF_HOME=/var/cache/probe/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1
VOLUME ["/var/lib/probe", "/var/cache/probe"]
WORKDIR /var/lib/probe
ENTRYPOINT ["/usr/bin/tini", "--"]

FROM base AS server
COPY --from=server-packages /opt/probe /opt/probe
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl
USER 10001:10001
# Reachable from outside the container, so it does not start without keys.
ENV PROBE_HOST=0.0.0.0 PROBE_PORT=8765
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "server.api", "--check"]
CMD ["python", "-m", "server.api"]

FROM base AS worker
# g++: torch.compile (model.compile) builds its kernels when it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-packages /opt/probe /opt/probe
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --start-interval=5s --retries=3 \
    CMD ["python", "-m", "server.worker", "--check"]
CMD ["python", "-m", "server.worker"]
