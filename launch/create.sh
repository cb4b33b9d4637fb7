#!/usr/bin/env bash
# Ask for TPUs: one queued resource of one or several slices. Does nothing if it exists.
#
#   PROJECT=... ZONE=... NAME=... ACCELERATOR=v6e-64 BUCKET=gs://... REPOSITORY=... REVISION=... \
#     launch/create.sh [--dry-run]
#
# Also read: SLICES (1), PROVISIONING (spot; or reserved, on-demand), MAX_DURATION (such as 24h).
# Every node runs launch/startup.sh when it boots, the first time and after a recreation.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR BUCKET REPOSITORY REVISION

case "$(generation)" in
  v5e) image=v2-alpha-tpuv5-lite ;;
  v5p) image=v2-alpha-tpuv5 ;;
  v6e) image=v2-alpha-tpuv6e ;;
  *) exit 1 ;; # generation has said why
esac

arguments=(
  "$NAME"
  "--accelerator-type=$ACCELERATOR"
  "--runtime-version=$image"
  "--metadata=jrm-repository=$REPOSITORY,jrm-revision=$REVISION,jrm-bucket=$BUCKET"
  "--metadata-from-file=startup-script=$here/startup.sh"
)
if (($(slices) > 1)); then
  arguments+=("--node-count=$(slices)" "--node-prefix=$NAME")
else
  arguments+=("--node-id=$NAME")
fi
case "${PROVISIONING:-spot}" in
  spot) arguments+=(--spot) ;;
  reserved) arguments+=(--reserved) ;;
  on-demand) ;;
  *) fail "PROVISIONING=$PROVISIONING: spot, reserved or on-demand" ;;
esac
[[ -z "${MAX_DURATION:-}" ]] || arguments+=("--max-run-duration=$MAX_DURATION")

if ((!DRY_RUN)) && [[ "$(state)" != @(ABSENT|UNKNOWN) ]]; then
  echo "$NAME exists already"
  exit 0
fi
resources create "${arguments[@]}"
