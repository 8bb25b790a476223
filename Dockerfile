# docker build -t qwen_lit .
# docker run --gpus all --rm -it -v "$PWD":/work -v qwen_hub:/hub qwen_lit fit --config configs/qwen7b.yaml
# torch's wheels bring CUDA; of the host it needs the NVIDIA driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# gcc, because Triton compiles a launcher for its kernels when they first run.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/qwen_lit
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY configs configs
COPY qwen_lit qwen_lit
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf]'

# Whoever runs it, by --user as well, writes here: models and tokenised rows in /hub, results in /work.
RUN useradd --create-home qwen && mkdir /hub /work && chown qwen /hub /work && chmod 1777 /hub
ENV HF_HOME=/hub XDG_CACHE_HOME=/hub TRITON_CACHE_DIR=/hub/triton PYTHONUNBUFFERED=1
USER qwen
WORKDIR /work
VOLUME ["/hub", "/work"]
ENTRYPOINT ["qwen-lit"]
CMD ["--help"]
