#!/usr/bin/env bash
# Train on all workers of all slices: the same command everywhere, exit status of the run.
#
#   PROJECT=... ZONE=... NAME=... ACCELERATOR=... BUCKET=gs://... launch/run.sh [--dry-run] -- \
#     --config=configs/joint.py:qwen3_vl_8b --config.backbone.path=/jrm/weights/... \
#     --config.data.path=/jrm/data/... --workdir=/jrm/bucket/runs/NAME
#
# Waits for launch/startup.sh to be done on each worker first, and ends with 3 where it failed or
# took longer than START_MINUTES (120). A run that goes on resumes by itself.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR BUCKET
((${#REST[@]})) || fail "arguments of jrm_jax.main are missing: launch/run.sh -- --config=..."

printf -v training '%q ' "${REST[@]}"
failed="launch/startup.sh failed, or took too long (sudo journalctl -u google-startup-scripts)"
await="n=0; until [ -e /jrm/ready ]; do if [ -e /jrm/failed ] || "
await+="[ \$((n += 5)) -gt $((${START_MINUTES:-120} * 60)) ]; then echo '$failed'; exit 3; fi; sleep 5; done"
remote="cd /jrm/code && source launch/tpu_env.sh $(generation) $(slices)"
# a process of an earlier start may still be about to notice that its peers are gone
remote+=" && exec flock -w 600 /jrm/lock /jrm/venv/bin/python -m jrm_jax.main --distributed=on $training"

on_all() { # a command on all workers of all slices; the status of one that failed, if any
  local pids=() pid node status=0
  for node in $(node_ids); do # the slices find each other: all of them must be started
    run gcloud compute tpus tpu-vm ssh "$node" --project="$PROJECT" --zone="$ZONE" \
      --worker=all --command="$1" &
    pids+=($!)
    ((!DRY_RUN)) || wait "${pids[-1]}" # in order, to be read
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

log=$(mktemp) status=0
on_all "$await" | tee "$log" || status=$?
said=$(<"$log")
rm "$log"
if ((!DRY_RUN)) && [[ "$said" == *"$failed"* ]]; then # gcloud may end with a status of its own
  exit 3
fi
((status == 0)) || exit "$status"
((DRY_RUN)) || [[ -z "${STARTED:-}" ]] || touch "$STARTED" # for watch.sh
on_all "$remote"
