"""A table of positions: nothing reads past its end."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.embed import Embed
from jaxalign.models.transformer import Model
from jaxalign.rollout.continuous import continue_prompts
from jaxalign.rollout.sampling import Sampling
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES


def test_a_table_of_positions_has_an_end():
    """Beyond it nothing is computed: a length is refused where it is known, and else there is no number."""
    config = from_hf(CASES["gpt2"], **tiny.SETTINGS)
    silent = {name: value for name, value in CASES["gpt2"].items() if name != "n_positions"}
    assert config.num_positions == config.context == 40
    assert from_hf(silent, **tiny.SETTINGS).num_positions == 1024
    model = Model(config)
    assert model.for_length(40) is model
    with pytest.raises(InputError, match="41 tokens, and the model's table has 40 positions"):
        model.for_length(41)
    params = jax.jit(model.init)(jax.random.key(0))
    forward = jax.jit(lambda rows: model.apply(params, rows)[0])
    assert np.isfinite(forward(tiny.causal(np.zeros((1, 40))))).all()
    assert np.isnan(forward(tiny.causal(np.zeros((1, 42))))[:, 40:]).all()
    cache = tiny.empty_cache(config, 1, 4)
    rows = tiny.causal([[5]])
    for position, last in ((39, False), (40, True)):
        one = model.apply(params, rows._replace(positions=rows.positions + position), cache)[0]
        assert np.isnan(one).all() == last


def test_slots_that_have_ended_stay_within_the_table(monkeypatch):
    """Rows end at different times, others begin in their place; no row, seen or not, reads past the last position."""
    model, read_at, embed = Model(from_hf(CASES["gpt2"], **tiny.SETTINGS)), [], Embed.__call__

    def noted(self, tokens, positions):
        jax.debug.callback(lambda positions: read_at.append(int(positions.max())), positions)
        return embed(self, tokens, positions)

    monkeypatch.setattr(Embed, "__call__", noted)
    params = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 64, n).astype(np.int32) for n in (20, 3, 7, 20, 1, 20, 18, 20, 20)]
    options = {"sampling": Sampling(1.0, 20), "stop_ids": (5,)}
    few, _ = continue_prompts(model, params, prompts, jax.random.key(3), num_slots=3, **options)
    all_at_once, _ = continue_prompts(model, params, prompts, jax.random.key(3), num_slots=9, **options)
    assert [s.ids for s in few] == [s.ids for s in all_at_once] and np.isfinite([s.logprob for s in few]).all()
    lengths = {len(s.ids) for s in few}
    assert max(lengths) == 20 and min(lengths) < 15
    jax.effects_barrier()
    assert max(read_at) == 39
