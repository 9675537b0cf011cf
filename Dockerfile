# syntax=docker/dockerfile:1
# PEM Server. Two flavours by a build argument:
#   docker build -t pem-server:gpu .                             on NVIDIA's CUDA runtime
#   docker build -t pem-server:cpu --build-arg DEVICE=cpu .      on a slim Python, for machines without a GPU
# Large requests travel to the workers through shared memory, and containers get 64 MB of it: run with --shm-size=1g.
#   docker run --shm-size=1g -p 127.0.0.1:8003:8003 -v pem-data:/data pem-server:cpu

ARG DEVICE=gpu
ARG CPU_IMAGE=python:3.11-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
# The same with the compiler, which the finished image does without.
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${CPU_IMAGE} AS base-cpu

FROM ${CUDA_IMAGE} AS base-gpu
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 && \
    rm -rf /var/lib/apt/lists/*

FROM base-cpu AS build-base-cpu

FROM ${CUDA_BUILD_IMAGE} AS build-base-gpu

FROM build-base-${DEVICE} AS build
ARG DEVICE
# What pip needs besides: for DEVICE=cpu, for example, --extra-index-url of an index that has CPU builds of torch.
# Without one, the regular build of torch is installed; it works on a CPU too, and is several gigabytes larger.
ARG PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The slim Python image brings venv with its own interpreter; Ubuntu splits it off.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
        $(if [ "${DEVICE}" = gpu ]; then echo python3 python3-venv; fi) && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pem
ENV PATH=/opt/pem/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ${PIP_ARGS} setuptools wheel ninja torch
COPY . .
# The GPUs that the CUDA kernels are compiled for; PTX serves later ones.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# The image refuses to be built without its compiled kernels, and proves that they load.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${DEVICE}" = gpu ]; then export FORCE_CUDA=1; fi && \
    REQUIRE_KERNELS=1 pip install -c constraints.txt ${PIP_ARGS} --no-build-isolation ./client ".[otel]" && \
    cd / && python -c "import pointnet2_ext as p; assert p.kernel_for('cpu') == 'compiled', p.kernel_for('cpu')" && \
    python -c "from posekit.geometric import kernels as k; assert k.kernel_for('cpu') == 'compiled', k.kernel_for('cpu')" && \
    python -c "from posekit.sam6d import kernels as k; assert k.kernel_for('cpu') == 'compiled', k.kernel_for('cpu')" && \
    if [ "${DEVICE}" = gpu ]; then \
        python -c "import pointnet2_ext as p; assert p.kernel_for('cuda') == 'compiled', p.kernel_for('cuda')"; \
    fi

FROM base-${DEVICE} AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="pem-server" \
      org.opencontainers.image.description="6D object pose estimation over HTTP: RGB-D frame, masks and CAD in, poses out" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini is process 1: it forwards SIGTERM to the server and reaps what its workers leave.
# The slim Python image lacks the libraries that Open3D and OpenCV load, and so does Ubuntu's.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        tini libusb-1.0-0 libgl1 libgomp1 libglib2.0-0 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin pem && \
    install -d -o pem -g pem /data
COPY --from=build /opt/pem /opt/pem
ENV PATH=/opt/pem/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEM_HOST=0.0.0.0 \
    PEM_PORT=8003 \
    PEM_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8003
STOPSIGNAL SIGTERM
# Ready means: the model is loaded and warm, registered objects too, and the server is not draining.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PEM_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["pem", "serve"]
