"""Layers in several stacks, of every family: named in Hugging Face's words and ours, and computed as in one stack."""

import jax
import numpy as np
import pytest

from jaxalign.models import stacks
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.train.trained import check, cuts_of, matched
from jaxalign.types import Rows
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

FAMILIES = {"llama": tiny.hf_config()} | CASES


def config_of(name):
    return from_hf(FAMILIES[name], dtype="float32", param_dtype="float32", remat="none", rope_length=40)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_have_names_in_every_family(name):
    config = config_of(name)
    last = config.num_layers - 1
    theirs = next(row.named((last,)) for row in config.family.names.rows if row.stacked).split(f".{last}.")[0]
    for pattern in ("layers[-1]", f"layers/{last}", rf"{theirs}\.{last}"):
        check(config, pattern)
        assert cuts_of(config, (pattern,)) == (last,), pattern
        found = matched(config, (pattern,))
        assert all(any(own) == path.startswith("layers/") for path, own in found.items())
    assert cuts_of(config, ("layers",)) is None and cuts_of(config, ()) is None


@pytest.mark.parametrize("name", ["gpt2", "qwen2_windows", "gemma3"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_windows_and_ropes_of_layers_go_with_their_stack(name, remat):
    config = from_hf(FAMILIES[name], dtype="float32", param_dtype="float32", remat=remat)
    model = Model(config)
    params = model.init(jax.random.key(0))
    parts = params | {"layers": stacks.cut(params["layers"], (1, 2))}
    places = np.arange(24, dtype=np.int32)[None].repeat(2, 0)
    rows = Rows(places * 7 % 60, places, 0 * places, places + 1)
    np.testing.assert_allclose(model.apply(parts, rows)[0], model.apply(params, rows)[0], rtol=0, atol=1e-5)
