#!/usr/bin/env bash
# One run on all workers of a Cloud TPU slice, over ssh.
#
#   TPU=my-v5e-64 ZONE=us-west4-a bash launch/tpu_pod.sh train CONFIG --out /mnt/runs/big
#   REPO=URL REF=COMMIT ...             the project to check out on the workers (default: origin, HEAD)
#   bash launch/tpu_pod.sh --dry-run train ...     print the command, start nothing
#
# --out must be a directory that every worker can write, such as a mounted network disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 1 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "usage: TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh [--dry-run] COMMAND [ARGUMENTS]" >&2
  exit 2
fi
repo="${REPO:-$(git remote get-url origin 2>/dev/null || true)}"
if [ -z "$repo" ]; then
  echo "launch/tpu_pod.sh: this checkout has no remote 'origin': set REPO to what the workers clone" >&2
  exit 2
fi
ref="${REF:-$(git rev-parse HEAD)}"

arguments="$(printf ' %q' "$@")"
remote="set -e
[ -d latent_jax_run ] || git clone $(printf %q "$repo") latent_jax_run
cd latent_jax_run && git fetch -q && git checkout -q --detach $(printf %q "$ref")
. launch/setup.sh && latent_jax_setup tpu
LATENT_JAX_DISTRIBUTED=tpu exec latent-jax$arguments"
launch=(gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$remote")
if [ -n "$dry" ]; then
  printf '%q ' "${launch[@]}"
  printf '\n'
  exit 0
fi
exec "${launch[@]}"
