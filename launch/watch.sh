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

if ((DRY_RUN)); then
  "$here/create.sh" --dry-run
  resources describe "$NAME" "--format=value(state.state)"
  "$here/run.sh" --dry-run -- "${REST[@]}"
  echo "# SUSPENDED or FAILED: delete, then create again"
  "$here/delete.sh" --dry-run
  exit 0
fi

restarts=0
asked=0 failed=0
places=$(mktemp -d)
trap 'rm -rf "$places"' EXIT
again() { # count a start that came to nothing
  restarts=$((restarts + 1))
  ((restarts <= ${MAX_RESTARTS:-50})) || give_up "after ${MAX_RESTARTS:-50} restarts"
  echo "restart $restarts: $*"
}
give_up() { # nobody watches them any more
  "$here/delete.sh" || echo "THE TPUS ARE NOT DELETED AND COST MONEY: launch/delete.sh" >&2
  fail "given up $*"
}

while true; do
  case "$(state)" in
    ABSENT)
      if "$here/create.sh"; then
        asked=1
      else # the first time it is likely a wrong setting, later a refusal that passes
        ((asked)) || exit 1
        again "asking for TPUs failed"
      fi
      ;;
    ACTIVE)
      asked=1 status=0
      STARTED="$places/started" "$here/run.sh" -- "${REST[@]}" || status=$?
      [[ ! -e "$places/started" ]] || failed=0
      rm -f "$places/started"
      if ((status == 0)); then
        until "$here/delete.sh"; do # they cost money until it has worked
          again "the run has finished, but the TPUs are not deleted and cost money"
          sleep "${POLL:-60}"
        done
        exit 0
      fi
      if ((status == 3)); then # another boot would end alike, unless it was the network
        ((failed += 1))
        ((failed < 2)) || give_up "as the nodes did not start, twice"
        again "the nodes did not start"
        "$here/delete.sh" || true
      else
        again "the run ended with status $status"
      fi
      ;;
    SUSPENDED | SUSPENDING | FAILED) # nothing brings these back
      asked=1
      again "the TPUs were taken away"
      "$here/delete.sh" || true # it has said why; the state is asked for again
      ;;
    *) ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, CREATING, DELETING, UNKNOWN: wait
  esac
  sleep "${POLL:-60}"
done
