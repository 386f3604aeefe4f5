#!/usr/bin/env bash
# The main job: makes or reuses .venv, then aligns a small model in a small world from start to finish.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--dry_run] [--config.STAGE.FIELD=VALUE ...]

SFT, then DPO, and a reward model, then PPO, on a world made from a seed; then their comparison. A few minutes on two
CPU cores, nothing to download but the packages. Results: runs/quickstart (--config.workdir=DIR for another place).

  --config.STAGE.FIELD=VALUE   changes a field of configs/quickstart.py; its stages are sft, reward, dpo and ppo:
                                 --config.dpo.algorithm.beta=0.1   --config.ppo.num_train_steps=30   --config.seed=1
                               .venv/bin/python -m jaxalign.config dpo lists the fields of an algorithm
  --dry_run                    says what would be installed and run, and does neither
TEXT
}
case ${1:-} in -h | --help) usage && exit 0 ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/say.sh
source launch/say.sh
take_dry_run "$@"
command=("${JAXALIGN_VENV:-.venv}/bin/python" -m jaxalign.examples.quickstart "${arguments[@]}")
bash launch/setup.sh ${dry_run:+--dry_run} plots
if [ -n "$dry_run" ]; then would "${command[@]}" && exit 0; fi
exec "${command[@]}"
