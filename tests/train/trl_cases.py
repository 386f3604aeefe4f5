"""One PPO update on fixed models and tokens: what this package makes of it, to be laid beside TRL 1.12's account.

TRL's numbers come from tests/oracle/ppo_trl_run.py, live in tests/oracle/test_ppo_trl.py, stored in
tests/golden/ppo_trl.npz.  Case "full" has completions that fill their row, where all of TRL's quantities but its
whitening (Bessel) and its logged means (unmasked) are right; case "ragged" ends by EOS, where TRL adds the score one
place late and counts that place in the value loss.
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops.advantages import gae
from jaxalign.ops.kl import kl_estimate, token_rewards
from jaxalign.ops.readout import scalar_readout, token_logprobs
from jaxalign.rewards.model import score_rows
from jaxalign.rewards.score_shaping import shape_scores
from jaxalign.rollout.completed import Rollout, completed_rows
from jaxalign.steps.policy import policy_objective
from jaxalign.steps.step import make_eval_step
from jaxalign.types import PolicyBatch
from tests.models.tiny_models import by_name
from tests.train.ppo_world import VOCAB, prompt_batch, tiny_model

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ppo_trl.npz"
MODELS = ("policy", "behaviour", "ref", "reward", "value")
EOS, PAD, WIDTH, LENGTH, ROWS = 2, 0, 5, 6, 8
COMMON = {"temperature": 0.7, "kl_coef": 0.1, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
CASES = {
    "full": COMMON | {"kl_estimator": "k3", "gamma": 0.99, "missing_eos_penalty": None},
    "ragged": COMMON | {"kl_estimator": "k1", "gamma": 1.0, "missing_eos_penalty": 1.0},
}


@cache
def models():
    """Name -> (model, params): policy, behaviour and reference are near each other, so that ratios are near 1."""
    rng = np.random.default_rng(0)

    def draw(model, scale):
        return jax.tree.map(lambda x: scale * rng.normal(size=x.shape).astype(np.float32), model.abstract())

    def add(one, other):
        return jax.tree.map(np.add, one, other)

    lm, scalar = tiny_model(tie_word_embeddings=True), tiny_model("score", tie_word_embeddings=True)
    base = draw(lm, 0.25)
    base = jax.tree_util.tree_map_with_path(lambda p, x: 1 + x if "scale" in str(p) else x, base)
    out = {name: (lm, add(base, draw(lm, 0.01))) for name in ("policy", "behaviour", "ref")}
    for name in ("reward", "value"):
        head = {"score": {"kernel": 0.3 * rng.normal(size=(16, 1)).astype(np.float32)}}
        out[name] = (scalar, add(base, draw(lm, 0.05)) | head)
    return out


@cache
def tokens(case):
    """Prompts (lists), completions int32 [ROWS, LENGTH] and noise on the old values."""
    rng = np.random.default_rng(1)
    prompts = [[1, *rng.integers(3, VOCAB, n)] for n in (1, 2, 3, 4, 4, 2, 3, 1)]
    prompts = [[int(t) for t in p] for p in prompts]
    completions = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    if case == "ragged":
        for row, end in enumerate((0, 1, 2, 3, 4, 5, None, None)):
            if end is not None:
                completions[row, end] = EOS
    return prompts, completions, (0.3 * rng.normal(size=(ROWS, LENGTH))).astype(np.float32)


def ours(case):
    """Every quantity of the update under the names of TRL's local variables, [ROWS, LENGTH] where per token."""
    c, (prompts, completions, noise) = CASES[case], tokens(case)
    temperature = c["temperature"] + 1e-7  # as TRL has it
    before = np.cumsum(completions == EOS, axis=1) - (completions == EOS)
    mask = before == 0
    finished = (completions == EOS).any(axis=1)
    rollout = Rollout(np.where(mask, completions, 0), mask, mask, np.zeros(mask.shape, np.float32), finished)
    batch = prompt_batch(prompts, WIDTH)
    rows, readouts = completed_rows(batch.rows, rollout)

    model, value_model = models()["policy"][0], models()["value"][0]

    @jax.jit
    def policy_logprobs(params):
        hidden, _, _ = model.apply(params, rows)
        return token_logprobs(hidden, model.head(params), readouts, temperature=temperature)[0]

    @jax.jit
    def value_of(params):
        hidden, _, _ = value_model.apply(params, rows)
        return scalar_readout(hidden, value_model.score_kernel(params), readouts)

    def logprobs(name):
        return policy_logprobs(models()[name][1])

    new_values = value_of(models()["value"][1])
    values = jnp.where(mask, new_values + noise, 0)
    scores = score_rows(*models()["reward"], rows, WIDTH - 1 + mask.sum(1).astype(np.int32))
    shaped = shape_scores(
        scores,
        np.ones(ROWS, bool),
        finished,
        None,
        scale=1.0,
        clip=None,
        missing_eos_penalty=c["missing_eos_penalty"],
    )
    old, ref = logprobs("behaviour"), logprobs("ref")
    kl = kl_estimate(old, ref, c["kl_estimator"])
    rewards = token_rewards(shaped, kl, mask, c["kl_coef"])
    advantages, returns = gae(rewards, mask, values=values, gamma=c["gamma"], gae_lambda=c["lam"])
    whole = batch._replace(rows=rows, readouts=readouts)
    return SimpleNamespace(
        mask=mask,
        finished=finished,
        logprobs=old,
        ref_logprobs=ref,
        new_logprobs=logprobs("policy"),
        values=values,
        vpred=new_values,
        scores=shaped,
        kl=jnp.where(mask, kl, 0),
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        batch=PolicyBatch(whole, old, ref, values, advantages, returns),
    )


def losses(case, batch):
    """(sums of the eval step, gradients of the mean losses by role and Hugging Face name)."""
    c = CASES[case]
    (policy, policy_params), (value, value_params) = models()["policy"], models()["value"]
    objective = policy_objective(
        policy.apply,
        policy.head,
        value.apply,
        value.score_kernel,
        temperature=c["temperature"] + 1e-7,
        clip_range=c["cliprange"],
        value_clip_range=c["cliprange_value"],
        vf_coef=c["vf_coef"],
        entropy_coef=0.0,
    )

    def mean(params):
        sums = make_eval_step(objective)(params, {}, {}, batch)
        return sum(sums[f"loss/{role}"][0] / sums[f"loss/{role}"][1] for role in params), sums

    gradients, sums = jax.jit(jax.grad(mean, has_aux=True))({"policy": policy_params, "value": value_params})
    named = {}
    for role, model in (("policy", policy), ("value", value)):
        named |= {f"{role}/{name}": x for name, x in by_name(model.config, gradients[role]).items()}
    return sums, named


def close(mine, theirs, mask=None, what=""):
    """Items to 1e-4 (DESIGN.md section 8: through the model, float32)."""
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    if mask is not None:
        mine, theirs = mine[mask], theirs[mask]
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4, err_msg=what)


def compare(case, trl):
    """Lays every quantity that TRL has right beside ours.

    Args:
      case: of CASES.
      trl: TRL's local variables at its first backward pass, rows in the order of `tokens`, and `gradient/...`.
    """
    mine = ours(case)
    mask = mine.mask
    np.testing.assert_array_equal(~trl["padding_mask"], mask)
    for name in ("logprobs", "ref_logprobs", "new_logprobs", "values", "kl"):
        close(getattr(mine, name), trl[name], mask, name)
    close(mine.scores, trl["scores"], what="scores, missing-EOS penalty included")
    if case == "full":
        for name in ("rewards", "returns", "values", "vpred"):
            close(getattr(mine, name), trl[name], what=name)
        # TRL whitens with Bessel's correction and so is smaller by sqrt((n - 1) / n)
        raw = np.asarray(mine.advantages)
        bessel = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
        close(bessel, trl["advantages"], what="advantages")
    else:
        # With lambda = 1 only the sum of later rewards counts, so that the place of the score does not matter.
        late = np.asarray(gae(mine.rewards, mask, values=mine.values, gamma=1.0, gae_lambda=1.0)[1])[:, 0]
        close(late, (trl["rewards"] * ~trl["padding_mask_p1"]).sum(1), what="sum of rewards")

    # The losses on TRL's own advantages and returns, so that they stand for themselves.
    given = mine.batch._replace(advantages=trl["advantages"], returns=trl["returns"])
    sums, gradients = losses(case, given)
    total, weight = sums["loss/policy"]
    assert float(weight) == mask.sum()
    np.testing.assert_allclose(total / weight, trl["pg_loss"], rtol=1e-5, atol=1e-6)
    clipped = {k: float(sums[k][0] / sums[k][1]) for k in ("policy/clipfrac", "val/clipfrac")}
    assert clipped["policy/clipfrac"] == pytest_approx(float(trl["pg_clipfrac"]))
    if case == "full":
        total, weight = sums["loss/value"]
        np.testing.assert_allclose(total / weight, 0.1 * trl["vf_loss"], rtol=1e-5, atol=1e-6)
        assert clipped["val/clipfrac"] == pytest_approx(float(trl["vf_clipfrac"]))
        approxkl = sums["policy/approxkl"]
        np.testing.assert_allclose(approxkl[0] / approxkl[1], trl["approxkl"], rtol=1e-4)
    for name, theirs in trl.items():
        if not name.startswith("gradient/"):
            continue
        name = name.removeprefix("gradient/")
        if case == "ragged" and name.startswith("value/"):
            continue  # TRL's value loss counts the place after the last token
        norm = np.linalg.norm(theirs)
        assert norm > 0, name
        assert np.linalg.norm(gradients[name] - theirs) <= 1e-4 * norm, name
    if case == "ragged":
        # TRAPS: TRL's means of these are over padding too, so that they must differ from the masked ones
        approxkl = sums["policy/approxkl"]
        masked = 0.5 * (np.asarray(mine.new_logprobs - mine.logprobs)[mask] ** 2).mean()
        np.testing.assert_allclose(approxkl[0] / approxkl[1], masked, rtol=1e-4)
        assert abs(float(trl["approxkl"]) - masked) > 0.05 * masked


def pytest_approx(value):
    """Shares of tokens: equal but for the division."""
    import pytest

    return pytest.approx(value, abs=1e-6)
