"""The small policy that tests of sampling share."""

import jax
import jax.numpy as jnp
import pytest

from tests.train.ppo_world import drawn, tiny_model


@pytest.fixture(scope="module")
def policy():
    model = tiny_model()
    return model, jax.tree.map(jnp.asarray, drawn(model))
