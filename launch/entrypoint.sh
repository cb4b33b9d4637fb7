#!/usr/bin/env bash
# The container's entry point: environment of the TPU generation, then python in this process, so
# that SIGTERM reaches it. GENERATION and SLICES come from the JobSet. --dry-run prints instead.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dry=()
if [[ "${1:-}" == --dry-run ]]; then
  dry=(--dry-run)
  shift
fi
# shellcheck source=launch/tpu_env.sh
source "$here/tpu_env.sh" "${GENERATION:?v5e, v5p, v6e or tpu7x}" "${SLICES:-1}" "${dry[@]}"
command=(python -m jrm_jax.main "$@")
if ((${#dry[@]})); then
  printf '%q ' exec "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
