"""A model with added tokens against transformers on torch: its export, and vectors beside those of its own resizing."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxalign.models import hf
from jaxalign.models.tokenizer import add_tokens, load_tokenizer
from jaxalign.ops.logits import logits
from tests.models import tiny_models as tiny
from tests.oracle.test_models_llama import torch_model

SETTINGS = {k: v for k, v in tiny.SETTINGS.items() if k != "rope_length"}
TOKENS = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 32])
def test_transformers_loads_and_computes_the_same(shared, tmp_path, tied, spare):
    tokenizer = load_tokenizer(shared / "models" / "stories260k-llama")
    size = len(tokenizer)
    config = tiny.hf_config(vocab_size=size + spare, tie_word_embeddings=tied)
    tiny.write(tmp_path / "base", config, tiny.tensors(config))
    added = add_tokens(tokenizer, TOKENS, size + spare)
    model, params = hf.load(tmp_path / "base", added=added, **SETTINGS)
    hf.save(tmp_path / "out", model, params, source=tmp_path / "base", tokenizer=tokenizer)

    theirs = torch_model(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>Once upon<|im_end|> a time"
    ids = their_tokenizer(text).input_ids
    assert ids == tokenizer(text).input_ids and {size, size + 1} <= set(ids)
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] == added.vocab_size
    hidden = model.apply(params, tiny.causal([ids]))[0]
    mine = np.asarray(logits(hidden, model.head(params)))
    np.testing.assert_allclose(mine, theirs(torch.tensor([ids])).logits.detach().numpy(), rtol=0, atol=1e-4)

    # Their own resizing draws about the same mean, with a variance a billionth of the vectors'.
    if not spare:
        resized = torch_model(tmp_path / "base")
        resized.resize_token_embeddings(size + 2, mean_resizing=True)
        for name in ("get_input_embeddings", "get_output_embeddings"):
            table, own = (getattr(m, name)().weight.detach().numpy() for m in (resized, theirs))
            np.testing.assert_allclose(own[size : size + 2], table[size:], rtol=0, atol=1e-3)
            np.testing.assert_array_equal(own[:size], table[:size])


def test_an_average_token_is_likelier(shared):
    """The mean of logits: at most the share that an average token has."""
    model, params = hf.load(shared / "models" / "stories260k-llama", **SETTINGS)
    tokenizer = load_tokenizer(shared / "models" / "stories260k-llama")
    rows = tiny.causal([tokenizer("Once upon a time").input_ids])
    table = params["embed"]["embedding"]
    grown = params | {"embed": {"embedding": jnp.concatenate([table, table.mean(0, keepdims=True)])}}
    z = np.asarray(logits(model.apply(params, rows)[0], model.head(grown)), np.float64)
    np.testing.assert_allclose(z[..., -1], z[..., :-1].mean(-1), atol=1e-4)
    assert (np.exp(z[..., -1]) <= np.exp(z[..., :-1]).mean(-1)).all()
