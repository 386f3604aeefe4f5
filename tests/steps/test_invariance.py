"""Loss and gradient of every algorithm do not depend on layout, accumulation or rematerialisation."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.pairs import paired_rows
from jaxalign.rollout.slots import repeat_rows
from jaxalign.types import Batch, PolicyBatch
from tests.steps.layouts import examples, lay
from tests.steps.worlds import ALGORITHMS, PAIRED, ROWS, assert_same, data, expected, many, result
from tests.train.ppo_world import prompt_batch


def test_there_is_something_to_see(x64):
    """The gradients compared below are not zero, whatever the tensor; the clipped losses are clipped in part."""
    for algorithm in ALGORITHMS:
        metrics, gradients = expected(algorithm)
        assert all(metrics[name] > 1 for name in metrics if name.startswith("weight"))
        assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients)), algorithm
    assert all(0.1 < metrics[name] < 0.9 for name in ("policy/clipfrac", "val/clipfrac"))


LAYOUTS = {
    "left": {"side": "left"},
    "5 on the left, the rest on the right": {"side": 5},
    "pad id that is a real token, junk where masked": {"pad": 7, "junk": 3},
    "left, pad id, junk": {"side": "left", "pad": 2, "junk": 4},
    "packed": {"packed": True},
    "packed, left, junk": {"packed": True, "side": "left", "junk": 5},
}
PAIR_LAYOUTS = {
    "shared prompt": {"shared": True},
    "shared prompt, left, junk": {"shared": True, "side": "left", "pad": 3, "junk": 6},
    "shared prompt, packed": {"shared": True, "packed": True},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trap_layout_changes_nothing(algorithm, x64):
    """Padding's side, amount and id, packing, a shared prompt: one program, the same numbers."""
    for layout in (LAYOUTS | (PAIR_LAYOUTS if algorithm in PAIRED else {})).values():
        assert_same(result(algorithm, data(algorithm, **layout)), algorithm)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12, deadline=None)
def test_any_plan_changes_nothing(draw):
    """Any order of the examples, in any rows, each with the prompt shared or not."""
    algorithm = draw.draw(st.sampled_from(ALGORITHMS))
    left = list(draw.draw(st.permutations(many(algorithm))))
    plan = []
    while left:
        size = draw.draw(st.integers(1, 2))
        plan, left = [*plan, left[:size]], left[size:]
    layout = {
        "side": draw.draw(st.sampled_from(["left", "right"])),
        "pad": draw.draw(st.integers(0, 31)),
        "junk": draw.draw(st.integers(0, 99)),
        "shared": algorithm in PAIRED and draw.draw(st.booleans()),
    }
    with jax.enable_x64(True):
        assert_same(result(algorithm, data(algorithm, plan=plan, **layout)), algorithm)


def test_completions_laid_out_in_pairs_on_the_device(x64):
    """Two completions of a prompt share a row that `paired_rows` makes of padded arrays; the oracle: a row for each."""
    width, length, rng = 32, 24, np.random.default_rng(3)
    asked = examples(4, 2, seed=9, completion=(1, length), weights=True)
    each = [e._replace(completions=[said]) for e in asked for said in e.completions]
    values = {name: rng.normal(0, 1, (ROWS, length)) for name in PolicyBatch._fields[1:]}
    alone = lay([[e] for e in each], m=2 * length, width=80, num_rows=ROWS, dtype=np.float64)
    wide = {name: np.pad(x, ((0, 0), (0, length))) for name, x in values.items()}
    wanted = result("ppo", PolicyBatch(alone, **wide))

    prompts = prompt_batch([e.prompt for e in asked], width, rows=ROWS)  # half of them are not there
    rows = repeat_rows(prompts.rows, 2)
    mask = np.arange(length) < np.array([len(e.completions[0]) for e in each] + [0] * ROWS)[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([e.completions[0] for e in each])
    rows, readouts = jax.jit(paired_rows)(rows, Rollout(tokens, mask, mask, 0.0 * mask, mask[:, 0]))
    pairs = lay([[e] for e in asked], shared=True, m=2 * length, width=80, num_rows=ROWS, dtype=np.float64)
    batch = Batch(rows, readouts, pairs.completions, pairs.record_ids)
    assert rows.tokens.shape == alone.rows.tokens.shape and readouts.mask.shape == alone.readouts.mask.shape
    found = result(
        "ppo", PolicyBatch(batch, **{n: np.pad(x.reshape(4, -1), ((0, 4), (0, 0))) for n, x in values.items()})
    )
    assert found[0]["tokens"] == mask.sum() and found[0]["policy/clipfrac"] > 0.1
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batch_of_padding_alone(algorithm, x64):
    """No loss, no weight, no gradient, nothing that is not a number; the junk in masked places notwithstanding."""
    metrics, gradients = result(algorithm, data(algorithm, plan=[], junk=8))
    assert all(np.isfinite(x) for x in metrics.values())
    nothing = [n for n in metrics if n.split("/")[0] in ("loss", "weight", "grad_norm", "tokens", "skipped")]
    assert len(nothing) == 2 + 3 * len(gradients)
    assert all(metrics[name] == 0 for name in nothing)
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


def test_trap_width_of_rows_changes_nothing(x64):
    assert_same(result("sft", data("sft", width=33, m=16, c=2)), "sft")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trap_accumulation_changes_nothing(algorithm, x64):
    """Eight micro-batches of one row; the weights and lengths of the rows differ."""
    assert_same(result(algorithm, data(algorithm), accum=8), algorithm)


@pytest.mark.parametrize(
    ("algorithm", "remat"),
    [("sft", "dots"), ("sft", "full"), ("reward", "full"), ("dpo", "attention"), ("ipo", "dots"), ("ppo", "full")],
)
def test_rematerialisation_changes_nothing(algorithm, remat, x64):
    assert_same(result(algorithm, data(algorithm), remat=remat), algorithm)
