"""Frozen models in host memory between their uses: the same run, with fewer bytes on the devices while it learns."""

import gc

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxalign.config import defaults
from jaxalign.models import hf
from jaxalign.train import trainer
from jaxalign.train.experience import Prepare


def test_a_run_is_bitwise_the_same_and_holds_less_while_it_learns(shared, tmp_path, monkeypatch):
    path = shared / "models" / "stories260k-llama"
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "key": jax.random.key(0)}
    model, params = hf.load(path, head="score", **options)
    hf.save(tmp_path / "reward", model, params, source=path)
    del params
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "The dog"}\n' * 4)
    held = {}

    def record(self, *args, call=Prepare.__call__):
        found = call(self, *args)
        gc.collect()
        jax.block_until_ready(found)
        live = [x for x in jax.live_arrays() if not x.is_deleted()]
        held.setdefault(self.config.algorithm.offload, []).append(
            [sum(x.nbytes for x in live if x.sharding.memory_kind == kind) for kind in ("device", "pinned_host")]
        )
        return found

    monkeypatch.setattr(Prepare, "__call__", record)
    results = {}
    for offload in (False, True):
        c = defaults("ppo")
        c.workdir, c.model.path, c.rewards.model = str(tmp_path / str(offload)), str(path), str(tmp_path / "reward")
        c.data.sources, c.data.max_length, c.model.remat = (str(tmp_path / "prompts.jsonl"),), 64, "none"
        c.batch_size, c.num_train_steps, c.rollout.max_new_tokens = 4, 2, 8
        c.algorithm.offload, c.algorithm.num_ppo_epochs, c.optimizer.learning_rate = offload, 1, 1e-3
        c.logging.tensorboard = c.logging.progress = False
        results[offload] = trainer.run(c, devices=jax.devices()[:1])
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("False", "True"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    same = ("loss", "objective/kl", "objective/scores", "grad_norm")
    assert [results[True]["metrics"].get(m) for m in same] == [results[False]["metrics"].get(m) for m in same]
    frozen = sum(results[False]["model_bytes"][role] for role in ("ref", "reward"))
    print(held, frozen)
    for without, with_it in zip(held[False], held[True], strict=True):
        assert without[0] - with_it[0] == frozen and (without[1], with_it[1]) == (0, frozen)
