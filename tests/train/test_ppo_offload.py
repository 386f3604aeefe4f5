"""What is not in use waits in host memory: the same run, with fewer bytes on the devices in each of its phases."""

import gc

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from jaxalign.config import defaults
from jaxalign.models import hf
from jaxalign.train import trainer
from jaxalign.train.compiled import Compiled
from jaxalign.train.experience import Experience


@pytest.fixture
def compiled_once(tmp_path):
    """Programs of two runs that are equal are compiled in the first."""
    wanted = {"jax_compilation_cache_dir": str(tmp_path / "xla"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: jax.config.values[name] for name in wanted}
    for values in (wanted, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is wanted:
            yield


def test_a_run_is_bitwise_the_same_and_holds_less(shared, tmp_path, monkeypatch, compiled_once):
    path = shared / "models" / "stories260k-llama"
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "key": jax.random.key(0)}
    model, params = hf.load(path, head="score", **options)
    hf.save(tmp_path / "reward", model, params, source=path)
    del params
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "The dog"}\n' * 4)
    held = {}

    def recorded(kind, name):
        call = getattr(kind, name)

        def record(self, *args):
            found = call(self, *args)
            jax.block_until_ready(found)
            gc.collect()
            live = [x for x in jax.live_arrays() if not x.is_deleted()]
            held.setdefault((kind.__name__, c.algorithm.offload), []).append(
                np.array(
                    [sum(x.nbytes for x in live if x.sharding.memory_kind == k) for k in ("device", "pinned_host")]
                )
            )
            return found

        monkeypatch.setattr(kind, name, record)

    recorded(Experience, "__call__")
    recorded(Compiled, "__call__")
    results = {}
    for offload in (False, True):
        c = defaults("ppo")
        c.workdir, c.model.path, c.rewards.model = str(tmp_path / str(offload)), str(path), str(tmp_path / "reward")
        c.data.sources, c.data.max_length, c.model.remat = (str(tmp_path / "prompts.jsonl"),), 64, "none"
        c.batch_size, c.num_train_steps, c.rollout.max_new_tokens = 4, 2, 8
        c.algorithm.offload, c.algorithm.num_ppo_epochs, c.optimizer.learning_rate = offload, 1, 1e-3
        c.logging.trackers, c.logging.progress = (), False
        results[offload] = trainer.run(c, devices=jax.devices()[:1])
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("False", "True"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    same = ("loss", "objective/kl", "objective/scores", "grad_norm")
    assert [results[True]["metrics"].get(m) for m in same] == [results[False]["metrics"].get(m) for m in same]
    assert results[True]["num_compiles"] == 1
    frozen = sum(results[False]["model_bytes"][role] for role in ("ref", "reward"))
    moments = results[False]["optimizer_bytes"]
    for phase, waiting in (("Experience", frozen + moments), ("Compiled", frozen)):
        without, with_it = held[phase, False], held[phase, True]
        assert len(without) == len(with_it) == 2
        for x, y in zip(without, with_it, strict=True):
            assert (x - y).tolist() == [waiting, -waiting] and x[1] == 0, phase
