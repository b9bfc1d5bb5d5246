#!/usr/bin/env bash
# All checks of the project: lint and tests. Makes .venv when missing.
#
#   bash launch/test.sh                     everything but the slow tests
#   bash launch/test.sh -k report           arguments go to pytest
#   MARK="" bash launch/test.sh             the slow tests too
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
latent_jax_setup dev || exit $?

began=$SECONDS
model=yes
latent-jax fetch smollm2 || {
  model=no
  echo "==> SmolLM2 could not be fetched: the tests that need it will be skipped" >&2
}

echo "==> ruff check"
lint=ok
ruff check . || lint=FAILED

echo "==> pytest"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
python -m pytest -q -m "${MARK-not slow}" --durations=5 "$@" 2>&1 | tee "$log"
tests=${PIPESTATUS[0]}

summary="$(grep -E '[0-9]+ (passed|failed|error|skipped|deselected)' "$log" | tail -n 1 | tr -d '=')"
echo "==> lint: $lint | tests: ${summary:-none ran} | smollm2: $model | $((SECONDS - began)) s"
[ "$lint" = ok ] && [ "$tests" -eq 0 ]
