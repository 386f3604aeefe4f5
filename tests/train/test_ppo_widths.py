"""Experience in a few shapes: a program for each that comes up, and results that do not depend on them."""

import jax
import numpy as np

from jaxalign.rollout import continuous, sizes
from tests.train.ppo_world import ppo_config, world
from tests.train.test_experience import fractional
from tests.train.test_num_samples import FIELDS, by_completion

MOST, WIDTHS = 40, (24, 32, 40)


def test_a_program_for_each_width_and_the_same_results(x64, monkeypatch):
    """Iterations until there were two widths; then a narrow one again, untrimmed: the same to 1e-9."""
    monkeypatch.setattr(sizes, "_NARROWEST", 24)
    c = ppo_config(batch_size=2, **FIELDS | {"rollout.max_new_tokens": MOST, "rollout.num_samples": 2})
    w = world(fractional, config=c, perturb=0.05, dtype="float64", prompts=[[1, 7, 9], [1, 8]])

    def iteration(number):
        state = w.state._replace(data_cursor=jax.device_put(np.int32(number), w.state.data_cursor.sharding))
        _, (batch,), metrics, _ = w.prepare(state, w.frozen, w.batch)
        return batch, metrics

    def programs():
        return [f._cache_size() for f in (w.prepare.collector.forward, w.prepare.batches)]

    seen = {}
    for number in range(8):
        batch, metrics = iteration(number)
        longest = max(len(said) for _, said, _ in by_completion(batch))
        width = batch.advantages.shape[1] // 2
        assert width == next(x for x in WIDTHS if x >= longest)
        assert batch.batch.rows.tokens.shape[1] == 5 + 2 * width
        seen.setdefault(width, (number, batch, metrics))
        assert programs() == [len(seen)] * 2
        if len(seen) > 1 and number > 1:
            break
    assert len(seen) == 2 and number > 1
    number, batch, metrics = seen[min(seen)]
    monkeypatch.setattr(continuous, "completion_width", lambda longest, most: most)
    wide, metrics2 = iteration(number)
    assert wide.advantages.shape[1] == 2 * MOST
    for (record, said, fields), (record2, said2, fields2) in zip(*map(by_completion, (batch, wide)), strict=True):
        assert (record, said) == (record2, said2)
        for name in fields:
            np.testing.assert_allclose(fields[name], fields2[name], rtol=0, atol=1e-9, err_msg=name)
    for name in metrics:
        if not name.startswith("time/"):
            np.testing.assert_allclose(metrics[name], metrics2[name], rtol=1e-9, atol=1e-9, err_msg=name)
