"""Tensors of several parts, and tensors that files hold under more than one name."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models import hf
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES


@pytest.mark.parametrize(
    "case, name",
    [
        ("phi3", "layers.1.self_attn.qkv_proj.weight"),
        ("phi3", "mlp.gate_up_proj.weight"),
        ("gpt_neox", "layers.2.attention.query_key_value.weight"),
        ("gpt_neox", "layers.1.attention.query_key_value.bias"),
        ("gpt2", "h.0.attn.c_attn.weight"),
        ("gpt2", "h.2.attn.c_attn.bias"),
    ],
)
def test_a_part_that_a_fused_tensor_lacks_is_an_error_that_names_it(tmp_path, case, name):
    tensors = tiny.tensors(CASES[case])
    whole = next(known for known in tensors if known.endswith(name))
    for change, words in (({}, f"no {whole}"), ({whole: tensors[whole][:-8]}, f"{whole} of shape")):
        tiny.write(tmp_path / words[:2], CASES[case], {k: v for k, v in tensors.items() if k != whole} | change)
        with pytest.raises(InputError) as error:
            hf.load(tmp_path / words[:2], **tiny.SETTINGS)
        assert words in str(error.value)


def test_parts_that_alternate_by_head(tmp_path):
    """Each head's query, key and value lie one behind the other; by a loop."""
    tensors = tiny.tensors(CASES["gpt_neox"])
    _, params = hf.load(tiny.write(tmp_path, CASES["gpt_neox"], tensors), **tiny.SETTINGS)
    matrix, bias = (tensors[f"gpt_neox.layers.1.attention.query_key_value.{end}"] for end in ("weight", "bias"))
    for n in range(4):
        for i, name in enumerate(("query", "key", "value")):
            found = jax.tree.map(lambda x, n=n: x[1][..., n, :], params["layers"]["attention"][name])
            rows = slice(24 * n + 8 * i, 24 * n + 8 * (i + 1))
            np.testing.assert_array_equal(found["kernel"], matrix[rows].T)
            np.testing.assert_array_equal(found["bias"], bias[rows])


def test_a_tensor_under_another_name(tmp_path):
    """transformers 5 calls Pythia's head as it calls others; a file with both is refused."""
    config, tensors = CASES["gpt_neox"], tiny.tensors(CASES["gpt_neox"])
    other = {"lm_head.weight" if name == "embed_out.weight" else name: value for name, value in tensors.items()}
    masks = {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.float32)}
    known, found = (
        hf.load(tiny.write(tmp_path / name, config, given), **tiny.SETTINGS)[1]
        for name, given in (("own", tensors | masks), ("other", other))
    )
    jax.tree.map(np.testing.assert_array_equal, found, known)
    with pytest.raises(InputError, match="another embed_out"):
        hf.load(tiny.write(tmp_path / "both", config, tensors | other), **tiny.SETTINGS)


def test_the_names_and_masks_of_first_files(tmp_path):
    """GPT-2's own: no prefix, a mask in every layer, the tied matrix under the head's name too."""
    config, tensors = CASES["gpt2"], tiny.tensors(CASES["gpt2"])
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old |= {f"h.{i}.attn.bias": np.ones((1, 1, 40, 40), np.float32) for i in range(3)}
    old["lm_head.weight"] = old["wte.weight"]
    known, found = (
        hf.load(tiny.write(tmp_path / name, config, given), **tiny.SETTINGS)[1]
        for name, given in (("new", tensors), ("old", old))
    )
    jax.tree.map(np.testing.assert_array_equal, found, known)
