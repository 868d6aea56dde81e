# trimtab with its demo models, ready to serve. Two targets:
#   docker build --target cpu -t trimtab:cpu .        docker build --target gpu -t trimtab:gpu .
#   docker run --shm-size 1g -p 8000:8000 trimtab:cpu
#   docker run --gpus all --shm-size 1g -p 8000:8000 -v ./models:/models:ro -v ./networks:/networks:ro \
#       trimtab:gpu /models/Qwen2.5-7B --value-network-dir /networks [any vLLM flag]
# PORT changes the port inside, for the health check too.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# A compiler at run time: vLLM compiles the target for the machine that it meets.
FROM ${PYTHON_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
RUN python -m venv /opt/trimtab
ENV PATH=/opt/trimtab/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/locks deploy/locks

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' deploy/locks/cpu.txt)" \
    && pip install --no-deps --requirement deploy/locks/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY value_models value_models
RUN pip install --no-deps --no-build-isolation .

FROM build AS build-gpu
RUN pip install --no-deps --requirement deploy/locks/gpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY value_models value_models
RUN pip install --no-deps --no-build-isolation .

FROM base AS runtime
RUN useradd --uid 10001 --create-home trimtab \
    && install --directory --owner trimtab /models /networks /home/trimtab/.cache
COPY --chown=trimtab:trimtab value_models/demo/weights /opt/demo
ENV PATH=/opt/trimtab/bin:$PATH PORT=8000
USER trimtab
WORKDIR /home/trimtab
VOLUME ["/models", "/networks", "/home/trimtab/.cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=4)"]
ENTRYPOINT ["sh", "-c", "exec trimtab serve --verbose --host 0.0.0.0 --port \"$PORT\" \"$@\"", "trimtab"]
CMD ["/opt/demo/target", "--served-model-name", "atlas", "--value-network-dir", "/opt/demo/networks"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/trimtab /opt/trimtab

FROM runtime AS cpu
COPY --from=build-cpu /opt/trimtab /opt/trimtab
