# CPU image. Two stages: the second one has no pip cache, no sources and nothing to build with.
FROM python:3.12-slim AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/scala
WORKDIR /src

COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY scala_model scala_model
COPY server server
COPY checkpoints/scala-xs-tiny-imagenet checkpoints/scala-xs-tiny-imagenet
RUN /opt/scala/bin/pip install -c constraints.txt ".[cpu,rate-limit,tracing]"


FROM python:3.12-slim

RUN useradd --uid 10001 --create-home scala
COPY --from=build /opt/scala /opt/scala
ENV PATH=/opt/scala/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SCALA_HOST=0.0.0.0 \
    SCALA_PORT=8000

# By number, so that Kubernetes can verify runAsNonRoot.
USER 10001
WORKDIR /home/scala
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SCALA_PORT\"]}/livez', timeout=2)"]
ENTRYPOINT ["scala-serve", "serve"]
