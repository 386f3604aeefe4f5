"""What a config.json may ask for and would be forgotten: dropout, frequencies that depend on the batch."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from tests.models.tiny_models import SETTINGS, causal, hf_config

DROPOUTS = [
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "summary_first_dropout"),
]


@pytest.mark.parametrize("name", DROPOUTS)
def test_trap_dropout_that_a_config_asks_for_is_refused_and_none_is_harmless(name):
    """TRAPS.md, dropout: on in one of policy and reference it is a KL that no update caused; jaxalign has none."""
    with pytest.raises(InputError, match=f"{name} is 0.1 in config.json"):
        from_hf(hf_config(**{name: 0.1}), **SETTINGS)
    assert from_hf(hf_config(**{name: 0.0}), **SETTINGS) == from_hf(hf_config(), **SETTINGS)


def test_dropout_of_a_head_that_is_not_there_is_harmless():
    """transformers drops out before the head of a token classifier alone, and jaxalign trains none."""
    assert from_hf(hf_config(classifier_dropout=0.1), **SETTINGS) == from_hf(hf_config(), **SETTINGS)


@pytest.mark.parametrize("head", ["lm", "score"])
def test_trap_no_random_state_hides_in_the_parameters(head):
    """A Dropout module would put keys and counts among the parameters: whole numbers in the tree."""
    tree = Model(from_hf(hf_config(), head=head, **SETTINGS)).abstract()
    assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {"float32"}
    assert all(np.prod(x.shape) > 1 for x in jax.tree.leaves(tree))


BY_LENGTH = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_trap_rope_frequencies_do_not_follow_the_batch(kind, form):
    """TRAPS.md: transformers takes them from the batch's longest row, so that neighbours change a row's numbers."""
    rope = BY_LENGTH[kind] | {"rope_type": kind}
    changes = {"rope_parameters": None, "rope_theta": 10000.0, "max_position_embeddings": 32, form: rope}
    model = Model(from_hf(hf_config(**changes), **SETTINGS | {"rope_length": 64}))
    params = model.init(jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 60, (1, 48))
    short, long = (model.apply(params, causal(ids[:, :n]))[0][0, :8] for n in (8, 48))
    np.testing.assert_allclose(short, long, rtol=0, atol=1e-5)
    as_trained = Model(from_hf(hf_config(**changes), **SETTINGS | {"rope_length": 32}))
    assert np.abs(as_trained.apply(params, causal(ids[:, :8]))[0][0] - short).max() > 1e-3  # the length counts
