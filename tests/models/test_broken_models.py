"""Models that are broken on disk: each fault is told by its own name, at once."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.hub import locate
from jaxalign.models.tokenizer import stop_ids
from jaxalign.models.weights import all_finite
from tests.models import tiny_models as tiny

GOOD = tiny.hf_config()
LINEAR = {"rope_type": "linear", "rope_theta": 1e4}


@pytest.fixture
def checkpoint(tmp_path):
    return tiny.write(tmp_path / "model", GOOD, tiny.tensors(GOOD))


def refusal(directory, **options) -> InputError:
    with pytest.raises(InputError) as error:
        hf.load(directory, **(tiny.SETTINGS | options))
    assert len(str(error.value)) < 1000
    return error.value


@pytest.mark.parametrize(
    "text",
    [b"", b"{a", b"[1]", b'"x"', b"null", b"\xff\xfe\x00", json.dumps(GOOD).encode("utf-16"), b"[" * 100_000],
    ids=["empty", "not_json", "list", "string", "null", "bytes", "utf16", "deep"],
)
def test_a_config_that_is_no_object_is_named(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text)
    assert str(checkpoint / "config.json") in refusal(checkpoint).found


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", None),
        ("model_type", ["llama"]),
        ("architectures", 3),
        ("architectures", {"a": 1}),
        ("architectures", [3]),
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("vocab_size", 10**12),
        ("hidden_size", 2**40),
        ("intermediate_size", 10**30),
        ("rope_theta", 10**400),
        ("rope_theta", "5001 digits"),
        ("rope_parameters", LINEAR | {"factor": float("nan")}),
        ("rope_parameters", LINEAR | {"factor": float("inf")}),
        ("max_position_embeddings", "128"),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", None),
        ("eos_token_id", "x"),
        ("eos_token_id", [[1]]),
        ("eos_token_id", 2.5),
        ("eos_token_id", [2, 10**9]),
        ("id2label", 3),
    ],
)
def test_a_field_that_cannot_be_is_named_with_its_file(checkpoint, field, value):
    (checkpoint / "config.json").write_text(json.dumps({}))
    config = {k: v for k, v in GOOD.items() if field != "rope_theta" or k != "rope_parameters"}
    text = json.dumps(config | {field: "VALUE"})
    digits = "1" + "0" * 5000 if value == "5001 digits" else json.dumps(value)
    (checkpoint / "config.json").write_text(text.replace('"VALUE"', digits))
    found = refusal(checkpoint).found
    named = "num_key_value_heads" if (field, value) == ("num_attention_heads", 7) else field
    assert (named in found or "JSON" in found) and str(checkpoint / "config.json") in found


def test_a_model_of_absurd_size_is_refused_before_its_shapes_are_made(tmp_path):
    huge = GOOD | {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "head_dim": 1 << 10}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(InputError, match="parameters"):
        hf.from_scratch(tmp_path, key=jax.random.key(0), **tiny.SETTINGS)


@pytest.mark.parametrize("value", ["x", 2.5, [True], {"a": 1}])
def test_stop_ids_that_are_none_are_named(checkpoint, value):
    class Tokenizer:
        eos_token_id = 2

    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match=r"eos_token_id .*generation_config\.json"):
        stop_ids(checkpoint, Tokenizer())
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 5]}))
    assert stop_ids(checkpoint, Tokenizer()) == (2, 5)


def test_a_misspelt_directory_is_offered_the_model_beside_it(checkpoint):
    near = str(checkpoint)
    with pytest.raises(InputError) as error:
        locate(f"{near[:-2]}{near[-1]}{near[-2]}/")
    assert error.value.fix == f"--config.model.path={near}"
    with pytest.raises(InputError, match="path=DIR"):
        locate(checkpoint.parent / "zzzz")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("target", ["/nowhere/blob", None], ids=["dangling", "loop"])
def test_a_link_to_nothing_is_named(checkpoint, name, target):
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target or name)
    with pytest.raises(InputError, match=f"{name} is a link to"):
        locate(checkpoint)


def test_links_beside_a_model_and_links_to_files_are_no_fault(checkpoint, tmp_path):
    (checkpoint / "notes.txt").symlink_to("/nowhere")
    (checkpoint / "self").symlink_to(checkpoint)
    (checkpoint / "model.safetensors").rename(tmp_path / "blob")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "blob")
    hf.load(checkpoint, **tiny.SETTINGS)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert str(loop) in refusal(loop).found


def test_a_pipe_is_no_model_file(checkpoint):
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).rename(checkpoint / "kept")
        os.mkfifo(checkpoint / name)
        assert name in str(refusal(checkpoint))
        (checkpoint / name).unlink()
        (checkpoint / "kept").rename(checkpoint / name)


def rewrite(file, change):
    """Changes a safetensors header, its data left as it is."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"]),  # both read the same bytes
        lambda h: h[UP].update(shape=[-48, -32]),
        lambda h: h[UP].update(shape=[48.0, 32]),
        lambda h: h[UP].update(dtype=["F32"]),
        lambda h: h[UP].update(data_offsets=[h[UP]["data_offsets"][1], h[UP]["data_offsets"][0]]),
        lambda h: h[UP].update(data_offsets=[0, 2**63]),
        lambda h: h.update({"__metadata__": 3}),
        lambda h: [h[n].update(data_offsets=[x + 4 for x in h[n]["data_offsets"]]) for n in h if n != "__metadata__"],
    ],
    ids=["overlap", "negative", "float", "type_list", "backwards", "beyond", "metadata", "shifted"],
)
def test_a_header_that_lies_is_told(checkpoint, change):
    rewrite(checkpoint / "model.safetensors", change)
    assert "model.safetensors" in refusal(checkpoint).found


def test_bytes_behind_the_last_tensor_are_told(checkpoint):
    with open(checkpoint / "model.safetensors", "ab") as file:
        file.write(b"1234")
    assert "bytes" in refusal(checkpoint).found


def test_a_deep_header_is_told(checkpoint):
    text = b"[" * 100_000
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "header" in refusal(checkpoint).found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name, at", [(UP, (3, 4)), ("model.embed_tokens.weight", (5, 6)), ("model.norm.weight", (7,))])
def test_trap_weights_that_are_no_numbers_are_told_at_load(tmp_path, dtype, name, at):
    tree = tiny.tensors(GOOD)
    tree[name][at] = np.nan
    tree[name][tuple(0 for _ in at)] = -np.inf
    directory = tiny.write(tmp_path / "model", GOOD, tree, jnp.dtype(dtype))
    found = refusal(directory, param_dtype=dtype).found
    assert name in found and "1 NaN and 1 infinite" in found


def test_weights_that_the_asked_type_cannot_hold_are_told(tmp_path):
    tree = tiny.tensors(GOOD)
    tree[UP][0, 0] = 1e6
    directory = tiny.write(tmp_path / "model", GOOD, tree)
    error = refusal(directory, param_dtype="float16")
    assert UP in error.found and "float16" in error.found and "param_dtype" in error.fix
    hf.load(directory, **tiny.SETTINGS)


def test_finite_by_bits():
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        dtype = jnp.dtype(dtype)
        array = np.zeros(200_001, dtype)
        array[:4] = [jnp.finfo(dtype).max, jnp.finfo(dtype).min, jnp.finfo(dtype).smallest_subnormal, -0.0]
        assert all_finite(array) and all_finite(array[:0])
        for value in (np.inf, -np.inf, np.nan, -np.nan):
            for place in (0, 70_000, 200_000):
                wrong = array.copy()
                wrong[place] = value
                assert not all_finite(wrong)


def test_trap_tied_weights_under_the_heads_name(tmp_path, checkpoint):
    _, expected = hf.load(checkpoint, **tiny.SETTINGS)
    tree = load_file(checkpoint / "model.safetensors")
    tree["lm_head.weight"] = tree.pop("model.embed_tokens.weight")
    save_file(tree, checkpoint / "model.safetensors")
    for head in ("lm", "score"):
        _, params = hf.load(checkpoint, head=head, key=jax.random.key(0), **tiny.SETTINGS)
        assert np.array_equal(params["embed"]["embedding"], expected["embed"]["embedding"])
    save_file(tree | {"model.embed_tokens.weight": tree["lm_head.weight"] + 1}, checkpoint / "model.safetensors")
    found = refusal(checkpoint).found
    assert "lm_head.weight" in found and "model.embed_tokens.weight" in found
    untied = tiny.write(tmp_path / "untied", GOOD | {"tie_word_embeddings": False}, tree)
    assert "model.embed_tokens.weight" in refusal(untied).found
