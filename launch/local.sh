#!/usr/bin/env bash
# One command on this machine, with all of its devices in one process.
#
#   bash launch/local.sh run configs/latentwire/tiny.yaml --out runs/mine
#   EXTRAS=cuda bash launch/local.sh ...          what is installed with the project: dev (default), cuda, tpu
#   RETRY=1 bash launch/local.sh train ...        start again while the command ends with 75 (saved, to be continued)
#   bash launch/local.sh --dry-run run ...        print the command, start nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 1 ]; then
  echo "usage: bash launch/local.sh [--dry-run] COMMAND [ARGUMENTS]" >&2
  exit 2
fi

export LATENT_JAX_DISTRIBUTED=off
launch=(latent-jax "$@")
if [ -n "$dry" ]; then
  printf 'LATENT_JAX_DISTRIBUTED=off'
  printf ' %q' "${launch[@]}"
  printf '\n'
  exit 0
fi

. launch/setup.sh
latent_jax_setup "${EXTRAS:-dev}" || exit $?
code=75
while [ "$code" -eq 75 ]; do
  code=0
  "${launch[@]}" || code=$?
  [ -n "${RETRY:-}" ] || break
done
exit "$code"
