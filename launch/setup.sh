# shellcheck shell=bash
# Sourced by demo.sh and test.sh: puts the project's virtual environment on PATH, making it if missing.
#
#   latent_jax_setup EXTRAS     e.g. latent_jax_setup dev
#
# PYTHON  interpreter that makes the environment (default: the first of python3.12, python3.11,
#         python3 that is at least 3.11)
# VENV    where the environment lies (default: .venv in the project)
#
# Nothing is installed again while pyproject.toml, the extras and the interpreter stay the same, so
# a populated environment works offline.

_latent_jax_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "latent_jax: needs Python 3.11 or newer with the venv module; found none" \
    "(tried: ${PYTHON:-python3.12 python3.11 python3 python}). Install one or set PYTHON=/path/to/python." >&2
  return 2
}

latent_jax_setup() {
  local extras="$1" venv="${VENV:-.venv}" python stamp wanted started=$SECONDS
  if [ ! -x "$venv/bin/python" ]; then
    python="$(_latent_jax_python)" || return 2
    echo "==> making $venv with $("$python" --version 2>&1) ($python)"
    "$python" -m venv "$venv"
  fi
  stamp="$venv/.latent_jax_installed"
  wanted="$extras $(cksum <pyproject.toml) $PWD"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "==> installing latent_jax[$extras] and its dependencies into $venv (about 600 MB; 1-5 minutes)"
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar on -e ".[$extras]"
    printf '%s\n' "$wanted" >"$stamp"
    echo "==> installed in $((SECONDS - started)) s"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  # XLA's buffers come and go every step, and by default each time from the system, page by page. Kept,
  # and in huge pages, they save 6 % (LatentWire) to 18 % (abstractinator) of a step's CPU time, at the
  # same peak of memory. glibc reads this once, when a program starts; other systems ignore it.
  GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=8000000000:glibc.malloc.mmap_threshold=8000000000}"
  export PATH GLIBC_TUNABLES
}
