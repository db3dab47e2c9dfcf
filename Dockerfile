# docker build -t simplernn .
# docker run --rm -v "$PWD/runs:/data/runs" simplernn train --config base --workdir runs/base
# For NVIDIA GPUs: --build-arg EXTRAS=serve,cuda, and docker run --gpus all.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG EXTRAS=serve
# The compiler is for the C functions, which are compiled on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 simplernn \
    && install --directory --owner=simplernn /data /data/runs
USER 1000
# For any user: docker run --user "$(id -u):$(id -g)" writes runs that belong to you.
ENV XDG_CACHE_HOME=/tmp/cache
WORKDIR /data
VOLUME /data/runs
ENTRYPOINT ["simplernn"]
CMD ["--help"]
