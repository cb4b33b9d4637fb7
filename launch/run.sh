#!/usr/bin/env bash
# Train on all workers of all slices: the same command everywhere, exit status of the run.
#
#   PROJECT=... ZONE=... NAME=... ACCELERATOR=... BUCKET=gs://... launch/run.sh [--dry-run] -- \
#     --config=configs/joint.py:qwen3_vl_8b --config.backbone.path=/jrm/weights/... \
#     --config.data.path=/jrm/data/... --workdir=/jrm/bucket/runs/NAME
#
# Waits for launch/startup.sh to be done on each worker first. A run that goes on resumes by itself.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR BUCKET
((${#REST[@]})) || fail "arguments of jrm_jax.main are missing: launch/run.sh -- --config=..."

printf -v training '%q ' "${REST[@]}"
remote="until [ -e /jrm/ready ]; do sleep 5; done; cd /jrm/code"
remote+=" && source launch/tpu_env.sh $(generation) $(slices)"
# a process of an earlier start may still be about to notice that its peers are gone
remote+=" && exec flock -w 600 /jrm/lock /jrm/venv/bin/python -m jrm_jax.main --distributed=on $training"

pids=()
for node in $(node_ids); do # the slices find each other: all of them must be started
  run gcloud compute tpus tpu-vm ssh "$node" --project="$PROJECT" --zone="$ZONE" \
    --worker=all --command="$remote" &
  pids+=($!)
  ((!DRY_RUN)) || wait "${pids[-1]}" # in order, to be read
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
