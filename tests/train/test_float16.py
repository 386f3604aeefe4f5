"""Training in float16 with loss scaling, for GPUs without bfloat16: it goes where float32 goes."""

import json
import math

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.train import trainer


def train(shared, workdir, algorithm, dtype):
    fields = {"model.dtype": dtype, "num_train_steps": 6, "checkpoint.every": 0, "optimizer.learning_rate": 1e-3}
    trainer.run(make_config(stories(shared, workdir, algorithm, **fields)), devices=jax.devices()[:1])
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:optimizer.learning_rate")
@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_it_follows_float32(shared, tmp_path, algorithm):
    half = train(shared, tmp_path / "half", algorithm, "float16")
    loss = "loss/policy" if algorithm == "ppo" else "loss"
    steps = [row for row in half if loss in row]
    assert all(math.isfinite(row[loss]) for row in steps)
    # The first steps may find the scale too high and move nothing: that is how it is found, and no failure.
    moved = [row["update_norm/policy" if algorithm == "ppo" else "update_norm"] > 0 for row in steps]
    assert all(moved[2:]) and all(row["skipped"] == 0 for row in steps)
    assert all(row["loss_scale"] >= 2**12 for row in steps)
    weights = load_file(tmp_path / "half" / "export" / "model.safetensors")
    assert all(np.isfinite(w).all() and w.dtype == np.float32 for w in weights.values())
    if algorithm == "sft":  # PPO loses its first update, and samples other texts from there
        full = train(shared, tmp_path / "full", algorithm, "float32")
        for key in ("loss", "grad_norm", "update_norm"):
            np.testing.assert_allclose([row[key] for row in steps], [row[key] for row in full], rtol=0.02, err_msg=key)
