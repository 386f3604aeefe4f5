#!/usr/bin/env bash
# The main job: makes or reuses .venv, then aligns a small model in a small world from start to finish.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--config.STAGE.FIELD=VALUE ...]

SFT, then DPO, and a reward model, then PPO, on a world made from a seed; then their comparison. A few minutes on two
CPU cores, nothing to download but the packages. Results: runs/quickstart (--config.workdir=DIR for another place).

  --config.STAGE.FIELD=VALUE   changes a field of configs/quickstart.py; its stages are sft, reward, dpo and ppo:
                                 --config.dpo.algorithm.beta=0.1   --config.ppo.num_train_steps=30   --config.seed=1
                               .venv/bin/python -m jaxalign.config dpo lists the fields of an algorithm
TEXT
}
case ${1:-} in -h | --help) usage && exit 0 ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launch/setup.sh plots
exec "${JAXALIGN_VENV:-.venv}/bin/python" -m jaxalign.pipeline.quickstart "$@"
