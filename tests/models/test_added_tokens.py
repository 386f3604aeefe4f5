"""Tokens that are added to a model: ids behind the tokenizer's own, and vectors that are the mean of the others."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.added_tokens import Added
from jaxalign.models.quantised import kernel_at
from jaxalign.models.tokenizer import add_tokens, check_vocabulary, load_tokenizer
from jaxalign.ops.trees import by_path
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from tests.models import tiny_models as tiny

SETTINGS = {k: v for k, v in tiny.SETTINGS.items() if k != "rope_length"}
# The vocabulary has 64 rows: the last of them spare; none spare, so that 64 more are made, in a table with a gap.
CASES = {
    "spare": Added(64, (60, 62), ((0, 60),)),
    "appended": Added(64, (64, 65, 66), ((0, 64),)),
    "both": Added(64, (63, 64), ((0, 7), (9, 63))),
}


def mean_by_hand(table, known):
    """A plain sum, number by number."""
    rows = [row for first, end in known for row in range(first, end)]
    return np.array([np.float32(sum(float(table[row, d]) for row in rows) / len(rows)) for d in range(table.shape[1])])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_vectors_are_the_mean_on_any_mesh(tmp_path, name, tied):
    added = CASES[name]
    tree = tiny.tensors(tiny.hf_config(tie_word_embeddings=tied))
    tiny.write(tmp_path, tiny.hf_config(tie_word_embeddings=tied), tree)
    found = []
    for devices, shape in ((1, (1, 1, 1)), (8, (1, 4, 2)), (8, (1, 2, 4))):
        mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[:devices])
        model, params = hf.load(
            tmp_path, added=added, shardings=lambda tree, mesh=mesh: param_shardings(mesh, tree), **SETTINGS
        )
        assert model.config.vocab_size == added.vocab_size == (64 if name == "spare" else 128)
        assert params["embed"]["embedding"].sharding.mesh.size == devices
        found.append(jax.device_get(params))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    tables = {"model.embed_tokens.weight": found[0]["embed"]["embedding"]}
    if not tied:
        tables["lm_head.weight"] = found[0]["lm_head"]["kernel"].T
    new = {*added.ids, *range(64, added.vocab_size)}
    for tensor, table in tables.items():
        assert table.shape == (added.vocab_size, 32)
        mean = mean_by_hand(tree[tensor], added.known)
        for row in range(added.vocab_size):
            np.testing.assert_array_equal(table[row], mean if row in new else tree[tensor][row])


def test_a_mean_is_rounded_once(tmp_path):
    """In bfloat16 the sum is not: rows of 1 and of 1 / 64 would otherwise lose the small ones."""
    tree = tiny.tensors(tiny.hf_config())
    table = np.ones((64, 32), np.float32)
    table[1:] = 1 / 64
    tiny.write(tmp_path, tiny.hf_config(), tree | {"model.embed_tokens.weight": table}, ml_dtypes.bfloat16)
    added = Added(64, (64,), ((0, 64),))
    _, params = hf.load(tmp_path, added=added, **SETTINGS | {"param_dtype": "bfloat16"})
    exact = np.float32((1 + 63 / 64) / 64).astype(ml_dtypes.bfloat16)
    assert (np.asarray(params["embed"]["embedding"])[64:] == exact).all()


def test_an_export_has_them_and_is_read_without_being_told(tmp_path):
    tiny.write(tmp_path / "base", tiny.hf_config(), tiny.tensors(tiny.hf_config()))
    model, params = hf.load(tmp_path / "base", added=CASES["appended"], **SETTINGS)
    hf.save(tmp_path / "out", model, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 128
    again, read = hf.load(tmp_path / "out", **SETTINGS)
    assert again.config.vocab_size == 128 and again.config.added is None
    jax.tree.map(np.testing.assert_array_equal, params, read)


def test_quantised_kernels_beside_whole_vectors(tmp_path):
    config = tiny.hf_config(tie_word_embeddings=False, hidden_size=64)
    tiny.write(tmp_path, config, tiny.tensors(config))
    whole = hf.load(tmp_path, added=CASES["both"], **SETTINGS)[1]
    params = hf.load(tmp_path, added=CASES["both"], quantised="nf4", **SETTINGS)[1]
    assert not any(kernel_at(path) for path in by_path(whole)) and any(kernel_at(path) for path in by_path(params))
    for path in ("embed/embedding", "lm_head/kernel"):
        found, wanted = (np.asarray(by_path(tree)[path]) for tree in (params, whole))
        assert found.dtype == wanted.dtype == np.float32 and (found == wanted).all()


def test_real_tokenizers(shared):
    for name, rows in (
        ("models/stories3m-llama", 4096),
        ("tokenizers/gpt2", 50257),
        ("tokenizers/gpt-neox-20b", 50432),
    ):
        tokenizer = load_tokenizer(shared / name)
        size, text = len(tokenizer), "Once <|im_start|>upon a<|im_end|> time"
        usual = tokenizer("Once upon a time").input_ids
        added = add_tokens(tokenizer, ("<|im_start|>", "<|im_end|>"), rows)
        assert added == Added(rows, (size, size + 1), ((0, size),))
        assert added.vocab_size == (rows if rows > size + 1 else -(-(rows + 2) // 64) * 64)
        ids = tokenizer(text).input_ids
        assert size in ids and size + 1 in ids and len(tokenizer) == size + 2
        assert tokenizer("Once upon a time").input_ids == usual
        assert "<|" not in tokenizer.decode(ids, skip_special_tokens=True)
        check_vocabulary(tokenizer, added.vocab_size)
        assert add_tokens(tokenizer, ("<|im_end|>", "<|im_start|>"), added.vocab_size) is None
        assert len(tokenizer) == size + 2


def test_a_saved_tokenizer_has_them_and_none_is_added_again(shared, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers/gpt2")
    add_tokens(tokenizer, ("<pad>", "<|tool|>", "the"), 50257)
    assert tokenizer.pad_token_id == 50257  # as a later start chooses
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.pad_token_id == 50257 and again("a<|tool|>b").input_ids == tokenizer("a<|tool|>b").input_ids
    assert add_tokens(again, ("<pad>", "<|tool|>", "the"), 50304) is None
    # One of the vocabulary keeps its id, and is a token wherever it stands.
    assert (
        1169 in again("other").input_ids and 1169 not in load_tokenizer(shared / "tokenizers/gpt2")("other").input_ids
    )


def test_a_tokenizer_with_more_tokens_than_the_model_has_vectors(shared):
    tokenizer = load_tokenizer(shared / "models/stories260k-llama")
    tokenizer.add_tokens(["<tool>", "<end>"])
    with pytest.raises(InputError, match=r"--config.model.add_tokens='\[\"<tool>\", \"<end>\"\]'"):
        check_vocabulary(tokenizer, 512)
    with pytest.raises(InputError, match="2 tokens without a vector") as error:  # some are no added tokens
        check_vocabulary(tokenizer, 512, "m", "a fix of its own")
    assert "add_tokens" not in error.value.fix
    with pytest.raises(InputError) as error:
        check_vocabulary(tokenizer, 500)
    assert "add_tokens" not in error.value.fix
    assert add_tokens(tokenizer, ("<tool>", "<end>"), 512) == Added(512, (512, 513), ((0, 512),))
    assert add_tokens(tokenizer, ("<end>",), 513) == Added(513, (513,), ((0, 513),))


def test_ids_with_gaps_that_would_be_given_twice(tmp_path):
    words = {"a": 0, "<unk>": 1, "</s>": 2, "b": 5}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="'b' before"):
        add_tokens(tokenizer, ("<x>", "<y>", "<z>"), 64)
