# fusewright on a CPU:
#
#     docker build -f .ci/containers/cpu.Dockerfile -t fusewright:cpu .
#     docker run --rm -it -v "$PWD:/work" fusewright:cpu train recipe.yaml
FROM python:3.12-slim

# g++ compiles the blocks of a model and the native kernels, at run time
RUN apt-get update && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml README.md CHANGELOG.md LICENSE /source/
COPY .ci/backend.py .ci/manifest.in /source/.ci/
COPY src /source/src
RUN pip install "/source[train,quant,rl,images,evaluation,export,tested]" && rm -r /source

RUN useradd --create-home user && install -d -o user /work
USER user
WORKDIR /work
ENTRYPOINT ["fusewright"]
CMD ["--help"]
