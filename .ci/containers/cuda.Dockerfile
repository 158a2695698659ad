# fusewright on NVIDIA GPUs; PyTorch's wheel brings CUDA's libraries, the host the driver:
#
#     docker build -f .ci/containers/cuda.Dockerfile -t fusewright:cuda .
#     docker run --rm -it --gpus all --ipc host -v "$PWD:/work" fusewright:cuda train recipe.yaml
FROM python:3.12-slim

# Triton starts kernels by code that gcc compiles; g++ is for what stays on the CPU
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu130

COPY pyproject.toml README.md CHANGELOG.md LICENSE /source/
COPY .ci/backend.py .ci/manifest.in /source/.ci/
COPY src /source/src
RUN pip install "/source[all,tested]" && rm -r /source

RUN useradd --create-home user && install -d -o user /work
USER user
WORKDIR /work
ENTRYPOINT ["fusewright"]
CMD ["--help"]
