#!/usr/bin/env bash
# The default tests: makes or reuses .venv, then runs pytest on two workers. Arguments go on to pytest:
#   bash tests/run.sh tests/ops -k kl
# Real models and data are read from $JAXALIGN_SHARED (default: ../shared); tests that need them say so where it is absent.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launch/setup.sh test
export JAX_PLATFORMS=cpu
python=${JAXALIGN_VENV:-.venv}/bin/python
if "$python" -c 'import sys, jaxlib; sys.exit(not jaxlib.__version__.startswith("0.10."))'; then
  # Most of the time goes into compiling small programs that run once: quickly compiled ones are enough here. The oracle
  # tests and everything that people run are compiled as always.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
fi
exec "$python" -m pytest --numprocesses="${JAXALIGN_TEST_WORKERS:-2}" --dist=loadfile \
  --no-loadscope-reorder "$@"
