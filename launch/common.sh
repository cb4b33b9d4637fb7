# shellcheck shell=bash
# Shared by the scripts here: settings, --dry-run, calls of gcloud. Sourced, never run.
# shellcheck disable=SC2153  # NAME and the others come from the environment

DRY_RUN=0
REST=()

usage() { # the comment at the top of the script that was called
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"
}

parse_arguments() {
  while (($#)); do
    case "$1" in
      --dry-run) DRY_RUN=1 ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        REST=("$@")
        return
        ;;
      *) fail "unknown argument $1 (--help lists them)" ;;
    esac
    shift
  done
}

fail() {
  echo "error: $*" >&2
  exit 1
}

need() { # NAME ... : variables that must be set
  local name absent=()
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || absent+=("$name")
  done
  ((${#absent[@]} == 0)) || fail "set ${absent[*]} (launch/README.md)"
}

run() { # run a command, or print it as it could be typed
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

resources() { # gcloud's group for queued resources, with project and zone
  run gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

state() { # the resource's state, or ABSENT; a question that fails otherwise is no answer
  local words problem file
  file=$(mktemp)
  if words=$(resources describe "$NAME" "--format=value(state.state)" 2>"$file"); then
    rm "$file"
    echo "$words"
    return
  fi
  problem=$(<"$file")
  rm "$file"
  if [[ "$problem" == *NOT_FOUND* || "$problem" == *"not found"* ]]; then
    echo ABSENT
  else
    echo "cannot ask for $NAME: $problem" >&2
    echo UNKNOWN
  fi
}

generation() { # v5e, v5p or v6e from ACCELERATOR
  case "$ACCELERATOR" in
    v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    *) fail "ACCELERATOR=$ACCELERATOR: v5litepod-N, v5p-N or v6e-N (TPU7x needs GKE: jobset.yaml)" ;;
  esac
}

slices() { echo "${SLICES:-1}"; }

node_ids() { # the names that gcloud gives the nodes
  local count index
  count=$(slices)
  if ((count == 1)); then
    echo "$NAME"
  else
    for ((index = 0; index < count; index++)); do echo "$NAME-$index"; done
  fi
}
