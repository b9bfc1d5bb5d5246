#!/usr/bin/env bash
# All checks of the project: lint and tests. Makes .venv when missing.
#
#   bash launch/test.sh                     everything but the slow tests
#   bash launch/test.sh -k report           arguments go to pytest
#   MARK="" bash launch/test.sh             the slow tests too
#   WORKERS=1 bash launch/test.sh           one process (two by default: compiling uses one core)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. launch/setup.sh
latent_jax_setup dev || exit $?

began=$SECONDS
# What could not be fetched is named in the last line; the tests that need it are skipped.
fetched=""
for asset in smollm2 zeros; do
  if latent-jax fetch "$asset"; then
    fetched="$fetched | $asset: yes"
  else
    fetched="$fetched | $asset: no"
    echo "==> $asset could not be fetched: the tests that need it will be skipped" >&2
  fi
done

echo "==> ruff check"
lint=ok
ruff check . || lint=FAILED

echo "==> pytest"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
# A worker that dies ends the run: one started in its place has been seen to wait for ever.
python -m pytest -q -m "${MARK-not slow}" -n "${WORKERS:-2}" --dist loadfile \
  --max-worker-restart=0 --durations=5 "$@" 2>&1 | tee "$log"
tests=${PIPESTATUS[0]}

summary="$(grep -E '[0-9]+ (passed|failed|error|skipped|deselected)' "$log" | tail -n 1 | tr -d '=')"
echo "==> lint: $lint | tests: ${summary:-none ran}$fetched | $((SECONDS - began)) s"
[ "$lint" = ok ] && [ "$tests" -eq 0 ]
