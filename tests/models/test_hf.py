"""Checkpoints in and out: bitwise, streamed, and every wrong key named."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import InputError
from jaxalign.models import export, hf, hf_names, weights
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from tests.models import tiny_models as tiny

FULL = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}


@pytest.fixture
def checkpoint(tmp_path):
    config = tiny.hf_config(**FULL)
    return tiny.write(tmp_path / "model", config, tiny.tensors(config))


def load(directory, **changes):
    return hf.load(directory, **(tiny.SETTINGS | changes))


def bits(tree):
    return {k: v.tobytes() for k, v in tree.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bitwise(tmp_path, dtype):
    config = tiny.hf_config(**FULL, my_version="7")
    tree = tiny.tensors(config)
    source = tiny.write(tmp_path / "in", config, tree, jnp.dtype(dtype), max_bytes=30_000)
    assert len(list(source.glob("model-*.safetensors"))) > 1
    model, params = load(source, param_dtype=dtype)
    out = hf.save(tmp_path / "out", model, params, max_bytes=20_000)
    read = {}
    for file in out.glob("*.safetensors"):
        assert file.stat().st_size < 21_000 + 8_000
        read |= load_file(file)
    assert bits(read) == bits({k: v.astype(jnp.dtype(dtype)) for k, v in tree.items()})
    written = json.loads((out / "config.json").read_text())
    assert written == config | {"dtype": dtype, "torch_dtype": dtype}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tree)
    assert index["metadata"]["total_size"] == sum(v.size for v in tree.values()) * jnp.dtype(dtype).itemsize


def test_types_are_converted_while_reading(tmp_path, checkpoint):
    _, params = load(checkpoint, param_dtype="bfloat16")
    _, exact = load(checkpoint)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b.astype(a.dtype)).all()), params, exact)))
    assert params["norm"]["scale"].dtype == jnp.bfloat16
    model, _ = load(checkpoint)
    out = hf.save(tmp_path / "narrow", model, exact, dtype="bfloat16")
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16


def test_straight_into_shards(checkpoint):
    """Every device reads its own part; the whole equals a load on one device. And saves from there."""
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings

    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    model, params = load(checkpoint, shardings=lambda tree: param_shardings(mesh, tree))
    _, single = load(checkpoint)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // 4, 48 // 2)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), params, single)))
    out = hf.save(checkpoint.parent / "out", model, params)
    assert bits(load_file(out / "model.safetensors")) == bits(load_file(checkpoint / "model.safetensors"))
    _, fresh = hf.from_scratch(
        checkpoint, key=jax.random.key(0), shardings=lambda tree: param_shardings(mesh, tree), **tiny.SETTINGS
    )
    assert fresh["layers"]["mlp"]["up"]["kernel"].sharding == kernel.sharding


def edit(directory, change):
    tree = load_file(directory / "model.safetensors")
    change(tree)
    save_file(tree, directory / "model.safetensors", {"format": "pt"})


BIG = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.update({"model.layers.0.extra.weight": np.zeros(1)}), "model.layers.0.extra.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[BIG]}), "model.layers.3.mlp.up_proj.weight"),
        (lambda t: t.pop(BIG), BIG),
        (lambda t: t.update({BIG: t[BIG].T.copy()}), BIG),
        (lambda t: t.update({BIG: t[BIG].astype(np.int8)}), BIG),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update({"score.weight": np.zeros((1, 32), np.float32)}), "score.weight"),
    ],
    ids=["unknown", "too_deep", "missing", "mis-shaped", "type", "head", "other_head"],
)
def test_a_wrong_key_is_named(checkpoint, change, named):
    edit(checkpoint, change)
    with pytest.raises(InputError) as error:
        load(checkpoint)
    assert named in error.value.found


def test_a_key_twice_is_named(checkpoint):
    model, params = load(checkpoint)
    out = hf.save(checkpoint.parent / "shards", model, params, max_bytes=40_000)
    files = sorted(out.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, files[1])
    with pytest.raises(InputError) as error:
        load(out)
    assert name in error.value.found
    files[1].unlink()
    with pytest.raises(InputError, match=files[1].name):
        load(out)


_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", _POINTER, '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}'],
)
def test_a_broken_index_is_named(checkpoint, text):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json is not an index"):
        load(checkpoint)


@pytest.mark.parametrize(
    "header", [[1], {"a": {}}, {"a": 3}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}]
)
def test_a_broken_header_is_named(checkpoint, header):
    text = json.dumps(header).encode()
    (checkpoint / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(checkpoint)


def test_a_file_cut_short_is_an_error(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 4):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load(checkpoint)
    file.write_text(_POINTER)
    with pytest.raises(InputError, match="git lfs pull"):
        load(checkpoint)
    file.unlink()
    (checkpoint / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        load(checkpoint)


def test_harmless_old_keys(tmp_path):
    config = tiny.hf_config()
    tree = tiny.tensors(config)
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "model.layers.0.attn.masked_bias": np.zeros(1, np.float32),
        "model.layers.0.attn.bias": np.zeros(1, np.float32),
        "lm_head.weight": tree["model.embed_tokens.weight"].copy(),
    }
    directory = tiny.write(tmp_path / "old", config, tree)
    edit(directory, lambda t: t.update(old))
    load(directory)
    edit(directory, lambda t: t.update({"lm_head.weight": old["lm_head.weight"] + 1}))
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load(directory)


def test_trap_scalar_head_starts_small(checkpoint):
    """TRAPS.md, reward models: head init std 1/sqrt(D+1); the token head is dropped, the rest is the checkpoint's."""
    model, params = load(checkpoint, head="score", key=jax.random.key(0))
    _, again = load(checkpoint, head="score", key=jax.random.key(0))
    _, policy = load(checkpoint)
    kernel = np.asarray(params["score"]["kernel"])
    assert kernel.shape == (32, 1) and 0.5 < kernel.std() * 33**0.5 < 1.5
    assert np.array_equal(kernel, again["score"]["kernel"])
    assert np.array_equal(params["layers"]["mlp"]["up"]["kernel"], policy["layers"]["mlp"]["up"]["kernel"])
    assert "lm_head" not in params
    with pytest.raises(InputError, match=r"no score\.weight"):
        load(checkpoint, head="score")
    out = hf.save(checkpoint.parent / "reward", model, params)
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert (written["num_labels"], written["pad_token_id"]) == (1, 0)
    back, same = load(out)
    assert back.config.head == "score"
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), params, same)))


def test_trap_reward_pooled_one_token_early(tmp_path, checkpoint, shared):
    """TRAPS.md, pad token = EOS token: transformers takes the last token that is not padding, so an exported reward
    model never names EOS as padding; where no other id can serve, it names none and transformers refuses batches."""
    config = tiny.hf_config(**FULL, pad_token_id=2, vocab_size=512)
    model = Model(from_hf(config, head="score", **tiny.SETTINGS))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.abstract())

    def exported_pad(**options):
        out = hf.save(tmp_path / "out", model, params, **options)
        return json.loads((out / "config.json").read_text())["pad_token_id"]

    assert exported_pad() is None
    assert exported_pad(source=shared / "models" / "stories260k-llama") == 0


def test_export_carries_tokenizer_and_generation_config(tmp_path, shared):
    source = shared / "models" / "stories260k-llama"
    model, params = load(source)
    out = hf.save(tmp_path / "out", model, params, source=source)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert bits(load_file(out / "model.safetensors")) == bits(load_file(source / "model.safetensors"))
    from jaxalign.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source, chat_template="{{ messages[0].content }}")
    hf.save(out, model, params, source=source, tokenizer=tokenizer)
    assert load_tokenizer(out).chat_template == "{{ messages[0].content }}"
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    for _ in range(2):  # an export again replaces it
        hf.save(out, model, params, source=source, tokenizer=tokenizer)
    assert load_tokenizer(out).chat_template == tokenizer.chat_template
    assert all(p.is_file() for p in out.iterdir())


def test_nothing_foreign_is_overwritten(tmp_path, checkpoint):
    model, params = load(checkpoint)
    for dtype in ("float8", "int8"):
        with pytest.raises(InputError, match=f"dtype {dtype}"):
            hf.save(tmp_path / "out", model, params, dtype=dtype)
    with pytest.raises(InputError, match=r"holds .*not written by jaxalign"):
        target = tmp_path / "thesis"
        target.mkdir()
        (target / "chapter1.tex").touch()
        hf.save(target, model, params)
    assert (target / "chapter1.tex").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file({"x": np.zeros(1)}, foreign / "model.safetensors", {"format": "pt"})
    (foreign / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        hf.save(foreign, model, params)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError):
        hf.save(file, model, params)


def test_an_export_is_whole_or_not_there(tmp_path, checkpoint, monkeypatch):
    """A failure half way leaves the earlier export as it was, and no litter."""
    model, params = load(checkpoint)
    target = tmp_path / "exports" / "export"
    hf.save(target, model, params)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    made = []

    def broken(row, *args, make=export._gather):
        made.append(row)
        if len(made) > 5:
            raise OSError("disk full")
        return make(row, *args)

    monkeypatch.setattr(export, "_gather", broken)
    with pytest.raises(OSError, match="disk full"):
        hf.save(target, model, jax.tree.map(lambda x: x * 2, params))
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in target.parent.iterdir()] == ["export"]
    monkeypatch.undo()
    hf.save(target, model, jax.tree.map(lambda x: x * 2, params), max_bytes=30_000)
    assert not (target / "model.safetensors").exists()
    assert np.array_equal(load(target)[1]["norm"]["scale"], params["norm"]["scale"] * 2)


def test_from_scratch_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config()))
    model, params = hf.from_scratch(tmp_path, key=jax.random.key(0), **tiny.SETTINGS)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract())
    with pytest.raises(InputError, match="no weights"):
        load(tmp_path)


def test_no_such_model(tmp_path):
    for path in (tmp_path / "absent", "./absent", "no-such-org-xyz/no-such-model"):
        with pytest.raises(InputError) as error:
            load(path)
        assert str(path) in error.value.found
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)


_MEASURE = """
import re, sys
import jax
from jaxalign.models import hf
def peak():  # of this program alone: ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = peak()
_, params = hf.load(sys.argv[1], dtype="float32", param_dtype="float32", remat="none")
print(peak() - before)
"""


def test_no_second_copy_in_host_memory(tmp_path):
    """A 300 MB file loads within its own size and one parameter more, mapped pages of the file included."""
    config = tiny.hf_config(vocab_size=16, hidden_size=1024, intermediate_size=768, num_hidden_layers=24, head_dim=64)
    shapes = {name: value.shape for name, value in _shapes(config).items()}
    planned = {
        name: weights.Planned(shape, lambda shape=shape: np.zeros(shape, np.float32)) for name, shape in shapes.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights.write_tensors(tmp_path, planned, np.dtype(np.float32), 10**10)
    size = (tmp_path / "model.safetensors").stat().st_size
    largest = 24 * 1024 * 768 * 4
    assert size > 290e6
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    env = os.environ | {
        "MALLOC_TRIM_THRESHOLD_": "65536"
    }  # what the C library keeps of freed arrays is no copy of ours
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True, env=env).stdout)
    assert size * 0.9 < grown < size + 1.3 * largest


def _shapes(config):
    """Shapes by Hugging Face name."""
    described = from_hf(config, **tiny.SETTINGS)
    abstract = jax.tree_util.tree_flatten_with_path(Model(described).abstract())[0]
    names, sizes = described.family.names, hf_names.sizes(described)
    shapes = {"/".join(k.key for k in p): x.shape for p, x in abstract}
    return {
        fused.rows[0].named(index): jax.ShapeDtypeStruct(fused.shape(sizes), jnp.float32)
        for fused, index in names.in_order(shapes)
    }
