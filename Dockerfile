# The image of launch/jobset.yaml: code and environment for TPU.
#   docker build -t REGION-docker.pkg.dev/PROJECT/jrm/jrm_jax:REVISION .
FROM python:3.11-slim

WORKDIR /jrm/code
# requirements first: a change of code does not install them again
COPY requirements.txt requirements-tpu.txt ./
RUN pip install --no-cache-dir -r requirements-tpu.txt
COPY jrm_jax jrm_jax
COPY configs configs
COPY launch launch
ENTRYPOINT ["launch/entrypoint.sh"]
