#!/usr/bin/env bash
# Give the TPUs back, whatever they are doing. Nothing on them is kept; the workdir is in the bucket.
#
#   PROJECT=... ZONE=... NAME=... launch/delete.sh [--dry-run]

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
parse_arguments "$@"
need PROJECT ZONE NAME

# where the question fails, deleting tells why
if ((!DRY_RUN)) && [[ "$(state)" == ABSENT ]]; then
  echo "$NAME does not exist"
  exit 0
fi
resources delete "$NAME" --force --quiet
