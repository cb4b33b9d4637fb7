#!/usr/bin/env bash
# From creation to the end of the run: wait for the TPUs, train, and create them anew when they are
# taken away. Ends when the run has finished, and deletes the TPUs then.
#
#   (the settings of create.sh and run.sh) launch/watch.sh [--dry-run] -- --config=... --workdir=...
#
# Also read: MAX_RESTARTS (50), POLL seconds (60). Run it on a machine that stays on, in tmux.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR BUCKET REPOSITORY REVISION
((${#REST[@]})) || fail "arguments of jrm_jax.main are missing: launch/watch.sh -- --config=..."

state() { # the resource's state, or ABSENT; a question that fails otherwise is no answer
  local words
  if words=$(resources describe "$NAME" "--format=value(state.state)" 2>&1); then
    echo "$words"
  elif [[ "$words" == *NOT_FOUND* || "$words" == *"not found"* ]]; then
    echo ABSENT
  else
    echo "cannot ask for $NAME: $words" >&2
    echo UNKNOWN
  fi
}

if ((DRY_RUN)); then
  "$here/create.sh" --dry-run
  resources describe "$NAME" "--format=value(state.state)"
  "$here/run.sh" --dry-run -- "${REST[@]}"
  echo "# SUSPENDED or FAILED: delete, then create again"
  "$here/delete.sh" --dry-run
  exit 0
fi

restarts=0
again() { # count a start that came to nothing
  restarts=$((restarts + 1))
  ((restarts <= ${MAX_RESTARTS:-50})) || fail "given up after ${MAX_RESTARTS:-50} restarts"
  echo "restart $restarts: $*"
}

while true; do
  case "$(state)" in
    ABSENT) "$here/create.sh" ;;
    ACTIVE)
      status=0
      "$here/run.sh" -- "${REST[@]}" || status=$?
      if ((status == 0)); then
        "$here/delete.sh"
        exit 0
      fi
      again "the run ended with status $status"
      ;;
    SUSPENDED | SUSPENDING | FAILED) # nothing brings these back
      again "the TPUs were taken away"
      "$here/delete.sh"
      ;;
    *) ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, CREATING, DELETING, UNKNOWN: wait
  esac
  sleep "${POLL:-60}"
done
