#!/usr/bin/env bash
# The main job on a machine with nothing but Python: makes .venv, fetches SmolLM2-135M (98 MB),
# trains latents that the frozen model reads, evaluates them beside controls, writes a report.
#
#   bash launch/demo.sh                         at most 10 minutes on 2 cores, 6 GB of memory
#   bash launch/demo.sh --set train.steps=400   arguments go to `latent-jax run`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
latent_jax_setup dev || exit $?
latent-jax fetch smollm2
exec latent-jax run configs/latentwire/smollm2_cpu.yaml "$@"
