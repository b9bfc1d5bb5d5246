#!/usr/bin/env bash
# The documentation as a folder of pages: README, how to add things, and the API from docstrings.
# A warning (a link that leads nowhere, a docstring that does not parse) is an error.
#
#   bash launch/docs.sh               build/docs/index.html
#   bash launch/docs.sh -d site       arguments go to `mkdocs build`; -d is relative to launch/docs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
latent_jax_setup docs || exit $?
mkdocs build --strict --quiet --config-file launch/docs/mkdocs.yml "$@"
echo "==> build/docs/index.html"
