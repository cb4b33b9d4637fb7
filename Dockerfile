# Images of the project. `train`, the last and so the default, is what launch/jobset.yaml runs:
#   docker build -t REGION-docker.pkg.dev/PROJECT/jrm/jrm_jax:REVISION .
#   docker build --target=serve -t jrm_jax-serve .                                    CPU
#   docker build --target=serve --build-arg=ACCELERATOR=gpu -t jrm_jax-serve:gpu .    or tpu
FROM python:3.11-slim AS base
WORKDIR /jrm/code

FROM base AS serve
# cpu, gpu (CUDA comes as wheels; the host needs the driver and NVIDIA's container toolkit) or tpu
ARG ACCELERATOR=cpu
COPY requirements*.txt ./
RUN extra=requirements.txt; [ "$ACCELERATOR" = cpu ] || extra=requirements-$ACCELERATOR.txt; \
    pip install --no-cache-dir -r "$extra" -r requirements-serve.txt
COPY jrm_jax jrm_jax
COPY configs configs
# not root; what is compiled is kept in a volume, so that a restart is ready in seconds
RUN useradd --create-home --uid 10001 jrm && install -d -o jrm -g jrm /jrm/programs
USER jrm
ENV JRM_COMPILATION_CACHE=/jrm/programs
VOLUME /jrm/programs
EXPOSE 8080
# exec form: python is process 1 and gets SIGTERM
ENTRYPOINT ["python", "-m", "jrm_jax.serve", "--host=0.0.0.0"]

FROM base AS train
# requirements first: a change of code does not install them again
COPY requirements.txt requirements-tpu.txt ./
RUN pip install --no-cache-dir -r requirements-tpu.txt
COPY jrm_jax jrm_jax
COPY configs configs
COPY launch launch
ENTRYPOINT ["launch/entrypoint.sh"]
