"""PPO's quantities, losses and gradients against TRL 1.12's own trainer, run live in its own environment."""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.models.export import save
from tests.train.trl_cases import CASES, GOLDEN, MODELS, compare, models, tokens

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("JAXALIGN_ORACLE_PPO_PYTHON", ROOT / ".venv-oracle-ppo" / "bin" / "python"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        model, params = models()[name]
        save(folder / name, model, jax.tree.map(jax.numpy.asarray, params))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_update_is_trls(directory, case, tmp_path):
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: a virtual environment with trl 1.12.0 (JAXALIGN_ORACLE_PPO_PYTHON)")
    prompts, completions, noise = tokens(case)
    given = {"settings": CASES[case], "prompts": prompts, "completions": completions.tolist(), "noise": noise.tolist()}
    (tmp_path / "case.json").write_text(json.dumps(given))
    out = tmp_path / "out.npz"
    script = Path(__file__).with_name("ppo_trl_run.py")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [PYTHON, script, directory, tmp_path / "case.json", out], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trl = dict(np.load(out))
    if os.environ.get("JAXALIGN_UPDATE_GOLDEN") == "1":
        stored = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        np.savez_compressed(GOLDEN, **stored | {f"{case}/{k}": v for k, v in trl.items()})
    compare(case, trl)
