"""What a config.json may ask for and would be forgotten: dropout, frequencies that depend on the batch."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from tests.models.tiny_models import SETTINGS, hf_config

DROPOUTS = [
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_first_dropout"),
]


@pytest.mark.parametrize("name", DROPOUTS)
def test_trap_dropout_that_a_config_asks_for_is_refused_and_none_is_harmless(name):
    """TRAPS.md, dropout: on in one of policy and reference it is a KL that no update caused; jaxalign has none."""
    with pytest.raises(InputError, match=f"{name} is 0.1 in config.json"):
        from_hf(hf_config(**{name: 0.1}), **SETTINGS)
    assert from_hf(hf_config(**{name: 0.0}), **SETTINGS) == from_hf(hf_config(), **SETTINGS)


@pytest.mark.parametrize("head", ["lm", "score"])
def test_trap_no_random_state_hides_in_the_parameters(head):
    """A Dropout module would put keys and counts among the parameters: whole numbers in the tree."""
    tree = Model(from_hf(hf_config(), head=head, **SETTINGS)).abstract()
    assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {"float32"}
    assert all(np.prod(x.shape) > 1 for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_trap_rope_frequencies_that_follow_the_batch_are_refused(kind, form):
    """TRAPS.md: transformers takes them from the batch's longest row, so that neighbours change a row's numbers."""
    rope = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    changes = {"rope_parameters": None, "rope_theta": 10000.0, form: rope}
    with pytest.raises(InputError, match=f"rope_type is '{kind}'"):
        from_hf(hf_config(**changes), **SETTINGS)
