#!/usr/bin/env bash
# The default tests: makes or reuses .venv, then runs pytest on two workers. Arguments go on to pytest:
#   bash tests/run.sh tests/ops -k kl
# Real models and data are read from $JAXALIGN_SHARED (default: ../shared); tests that need them say so where it is absent.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launch/setup.sh test
export JAX_PLATFORMS=cpu
exec "${JAXALIGN_VENV:-.venv}/bin/python" -m pytest --numprocesses="${JAXALIGN_TEST_WORKERS:-2}" --dist=loadfile \
  --no-loadscope-reorder "$@"
