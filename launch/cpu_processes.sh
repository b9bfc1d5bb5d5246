#!/usr/bin/env bash
# One run in N processes on this machine, over jax.distributed (gloo on CPU): what a pod does, in small.
#
#   bash launch/cpu_processes.sh 2 train configs/latentwire/tiny.yaml --out runs/two
#   DEVICES=4 bash launch/cpu_processes.sh 2 train ...     virtual devices of each process (default 1)
#   bash launch/cpu_processes.sh --dry-run 2 train ...     print the commands, start nothing
#
# Collectives of virtual devices wait in threads, of which there are as many as cores: a larger model on
# more devices than cores can wait for itself for ever (seen with 2 processes of 4 on 2 cores).
#
# When a process ends with an error the others are stopped, and its exit code is returned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
count="${1:-}"
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: launch/cpu_processes.sh [--dry-run] PROCESSES COMMAND [ARGUMENTS]" >&2
  exit 2
fi
shift

if [ -z "$dry" ]; then
  . launch/setup.sh
  latent_jax_setup dev
fi
port="${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"
export LATENT_JAX_DISTRIBUTED=flags
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

children=()
stop() {
  if [ "${#children[@]}" -gt 0 ]; then
    kill -TERM "${children[@]}" 2>/dev/null || true
  fi
}
trap stop INT TERM
for index in $(seq 0 $((count - 1))); do
  if [ -n "$dry" ]; then
    printf 'JAX_COORDINATOR_ADDRESS=%s JAX_NUM_PROCESSES=%s JAX_PROCESS_ID=%s latent-jax %s\n' \
      "$JAX_COORDINATOR_ADDRESS" "$count" "$index" "$*"
    continue
  fi
  JAX_PROCESS_ID="$index" latent-jax "$@" &
  children+=($!)
done
code=0
for _ in "${children[@]}"; do
  wait -n || {
    failed=$?
    [ "$code" -ne 0 ] || code=$failed
    stop
  }
done
exit "$code"
