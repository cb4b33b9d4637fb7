#!/usr/bin/env bash
# Runs as root on every node at every boot: code at a revision, its environment, the bucket. Each
# part is skipped where it is done already. `launch/startup.sh --dry-run` prints the commands.

set -Eeuo pipefail
DRY_RUN=0
[[ "${1:-}" != --dry-run ]] || DRY_RUN=1
ROOT=/jrm

run() { # on a node this file stands alone: nothing can be sourced
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

metadata() { # a value that create.sh has given
  if ((DRY_RUN)); then
    echo "METADATA-$1"
  else
    curl -sf -H "Metadata-Flavor: Google" \
      "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
  fi
}

run rm -f "$ROOT/ready" "$ROOT/failed" # until everything below is done
run mkdir -p "$ROOT/bucket" "$ROOT/compiled"
trap 'run touch "$ROOT/failed"' ERR # run.sh waits for one of the two

repository=$(metadata jrm-repository)
revision=$(metadata jrm-revision)
bucket=$(metadata jrm-bucket)

if ((DRY_RUN)) || ! command -v gcsfuse >/dev/null; then
  run apt-get update -q
  run apt-get install -q -y gcsfuse python3.11-venv
fi
if ((DRY_RUN)) || ! mountpoint -q "$ROOT/bucket"; then
  # implicit-dirs: folders that gcloud storage cp has made are seen; rename-dir-limit: a checkpoint
  # is made whole by renaming its folder, which gcsfuse refuses otherwise; modes: who trains is not
  # root, to whom everything in a mount belongs; ttl: other machines read the lock of a run
  run gcsfuse --implicit-dirs --rename-dir-limit=200000 --file-mode=666 --dir-mode=777 \
    --metadata-cache-ttl-secs=60 -o allow_other "${bucket#gs://}" "$ROOT/bucket"
fi

# Weights and data are read from the node's own disk: many small reads through a mount are slow.
for part in weights data; do
  run mkdir -p "$ROOT/$part"
  run gcloud storage rsync --recursive "$bucket/$part" "$ROOT/$part"
done

if ((DRY_RUN)) || [[ ! -d "$ROOT/code/.git" ]]; then
  run git clone "$repository" "$ROOT/code"
fi
run git -C "$ROOT/code" fetch origin
# a branch as it is there now, not as it was at the boot before
if ((!DRY_RUN)) && git -C "$ROOT/code" rev-parse -q --verify "origin/$revision^{commit}" >/dev/null; then
  revision="origin/$revision"
fi
run git -C "$ROOT/code" checkout --force --detach "$revision"

if ((DRY_RUN)) || [[ ! -x "$ROOT/venv/bin/python" ]]; then
  run python3.11 -m venv "$ROOT/venv"
fi
run "$ROOT/venv/bin/pip" install -q -r "$ROOT/code/requirements-tpu.txt"
run touch "$ROOT/lock"
run chmod -R a+rwX "$ROOT/compiled" "$ROOT/data" "$ROOT/lock"
run touch "$ROOT/ready"
