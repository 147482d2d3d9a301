# Two images of one server: `cpu` (OpenVINO, the default) and `cuda` (torch, whose wheels bring CUDA with them).
# Built by `make image` and `make image-cuda`; what pip installs is locked, with hashes, by `make lock-image`.
ARG PYTHON_IMAGE=python:3.12-slim-trixie


# What is installed below /image goes as it is into a final stage, which so gets neither pip's cache nor a tool to build
# with. Bytecode is written here, for a read-only file system takes none, and is trusted without a look at its source.
FROM ${PYTHON_IMAGE} AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_WARN_SCRIPT_LOCATION=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/image/build.txt ./
RUN pip install --require-hashes --only-binary :all: -r build.txt


FROM build AS package

COPY LICENSE README.md pyproject.toml ./
COPY scala_model scala_model
COPY server server
COPY checkpoints/scala-xs-tiny-imagenet checkpoints/scala-xs-tiny-imagenet
RUN pip install --root /image --no-compile --no-deps --no-index --no-build-isolation . \
    && python -m compileall -q --invalidation-mode unchecked-hash -s /image -p / /image


# Left out: OpenVINO's plugins for other devices and the tables of one of them, the packages' own tests, and what tells
# Google Analytics of each import of OpenVINO, which goes on without.
FROM build AS cpu-packages

COPY deploy/image/cpu.txt ./
RUN pip install --root /image --no-compile --ignore-installed --require-hashes --only-binary :all: -r cpu.txt \
    && find /image \( -name 'libopenvino_intel_[gn]pu_plugin.so' -o -path '*/openvino/libs/cache.json' -o -name tests \
        -o -name 'openvino_telemetry*' \) -prune -exec rm -r {} + \
    && python -m compileall -q --invalidation-mode unchecked-hash -s /image -p / /image


FROM build AS cuda-packages

COPY deploy/image/cuda.txt ./
RUN pip install --root /image --no-compile --ignore-installed --require-hashes --only-binary :all: -r cuda.txt \
    && python -m compileall -q --invalidation-mode unchecked-hash -s /image -p / /image


FROM ${PYTHON_IMAGE} AS runtime

LABEL org.opencontainers.image.title="scala-serve" \
      org.opencontainers.image.description="An image-classification server that spends as much network on each request as its latency budget allows" \
      org.opencontainers.image.licenses="Apache-2.0"
# The base comes without the standard library's bytecode, and a start takes 1.7 s with it, 2.7 s without, 4.5 s with no
# bytecode at all (two cores). /tmp is home, since nothing else can be counted on.
RUN python -m pip uninstall --quiet --yes pip \
    && python -m compileall -q --invalidation-mode unchecked-hash /usr/local/lib/python3.12 \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin scala \
    && install --directory --owner scala --group scala /var/cache/scala
# Without tini the server is PID 1, and a SIGTERM in its first second is lost: to PID 1 no signal is fatal by default.
COPY --from=build /usr/bin/tini /usr/bin/tini
ENV PYTHONUNBUFFERED=1 \
    SCALA_HOST=0.0.0.0 \
    SCALA_PORT=8000 \
    SCALA_PROFILE_DIR=/var/cache/scala
# Measured latencies, for the next start. A volume, so that they can be kept where the root is read-only.
VOLUME /var/cache/scala
# By number, so that Kubernetes can verify runAsNonRoot.
USER 10001
EXPOSE 8000
# Kubernetes has probes of its own and leaves this out.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-ISc", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SCALA_PORT']), timeout=2); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "scala-serve", "serve"]


FROM runtime AS cuda

# By these the NVIDIA container toolkit knows what of the driver to bring: CUDA, and NVML for how busy the GPU is.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /image /
COPY --from=package /image /
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"


FROM runtime AS cpu

COPY --from=cpu-packages /image /
COPY --from=package /image /
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
