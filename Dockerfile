# syntax=docker/dockerfile:1
# NVIDIA's PyTorch image brings torch, Transformer Engine, apex, flash-attention, CUDA and NCCL, built for each other;
# Megatron-Core, NeMo and the rest are added beside them.
#
#   docker build -t ctpd_nemo .
#   docker run --gpus all --ipc host -v "$PWD:/job" ctpd_nemo pipeline experiment=qwen2.5-7b_to_llama3.2-1b
ARG IMAGE=nvcr.io/nvidia/pytorch
ARG TAG=26.06-py3
FROM ${IMAGE}:${TAG}

ARG IMAGE
ARG TAG
LABEL org.opencontainers.image.title="ctpd_nemo" \
      org.opencontainers.image.description="Cross-tokenizer preference distillation on NeMo and Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${IMAGE}:${TAG}"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/ctpd_nemo

# The image's versions become constraints, for what is installed here and for whatever is installed on top of it.
COPY docker/image_packages.py docker/
RUN python docker/image_packages.py freeze constraints.txt
ENV PIP_CONSTRAINT=/opt/ctpd_nemo/constraints.txt

# Dependencies, a layer that changes with these two files alone: the versions that the tests run on, but for those that
# the image decides.
COPY docker/requirements.py docker/
COPY pyproject.toml constraints-cpu.txt ./
RUN python docker/requirements.py pyproject.toml > requirements.txt \
    && grep --invert-match --extended-regexp "^(torch|numpy)==" constraints-cpu.txt > tested.txt \
    && python -m pip install --no-cache-dir -c tested.txt -r requirements.txt \
    && python docker/image_packages.py check constraints.txt

COPY LICENSE README.md ./
COPY ctpd_nemo ctpd_nemo
COPY conf conf
COPY tools tools
RUN python -m pip install --no-cache-dir --no-deps --editable . \
    && python docker/image_packages.py check constraints.txt
COPY docker docker

# A number, so that Kubernetes can tell that it is not root.
ARG USER_ID=10001
RUN useradd --no-log-init --create-home --uid "${USER_ID}" ctpd && install --directory --owner ctpd /job
USER ${USER_ID}
# Models, data and runs: paths of the configuration begin here.
WORKDIR /job
ENTRYPOINT ["/opt/ctpd_nemo/docker/entrypoint.sh"]
CMD ["bash"]
