"""Models that are broken: their config.json, their files, their weights."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

from tests.fuzz.case import REFUSED, RUNS, SOUND, WARNS, Case
from tests.fuzz.world import train

GONE = object()


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `modelconfig` and `weights`."""
    return [*_fields(rng), *_files(rng), *_tensors(), *_training()]


def copied(place, name: str = "model") -> Path:
    """A model that a case may break."""
    shutil.copytree(place.world / name, place.here / "m")
    return place.here / "m"


def changed(file: Path, **fields) -> None:
    """A JSON file's fields set anew, or taken away where they are GONE."""
    value = json.loads(file.read_text())
    value |= fields
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not GONE}))


def ask(rng, place) -> list[str]:
    """The model is asked for a completion, or a run starts from it."""
    if rng < 0.7:
        return ["generate", "--model=m", "--prompt=the", "--max_new_tokens=3"]
    return train(place, "sft", "c.model.path = 'm'", dry=rng < 0.85)


def model_case(group, name, change, expect=REFUSED, words=(), how=0.0, source="model"):
    def make(place):
        change(copied(place, source))
        return ask(how, place)

    return Case(group, name, make, expect, words)


_NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "initializer_range",
)  # fmt: skip
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_OPTIONAL = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
_OPTIONAL += ("initializer_range", *_FLAGS)


def _fields(rng):
    values = {
        "gone": GONE,
        "null": None,
        "text": "x",
        "digits": "16",
        "zero": 0,
        "negative": -1,
        "part": 2.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "true": True,
        "list": [16],
        "object": {"a": 1},
        "huge": 10**9,
        "digits-400": 10**400,
    }
    for field in (*_NUMBERS, *_FLAGS):
        for name, value in values.items():
            expect = REFUSED
            if field in _OPTIONAL and name in ("gone", "null"):
                expect = SOUND
            if field in ("initializer_range", "rms_norm_eps", "rope_theta") and name in ("part", "huge"):
                expect = SOUND
            if field == "max_position_embeddings" and name == "huge":
                expect = SOUND
            if field == "initializer_range" and name == "zero":
                expect = SOUND
            if field in _FLAGS and name in ("zero", "true"):
                expect = SOUND

            def change(m, field=field, value=value):
                if field == "rope_theta":
                    changed(m / "config.json", rope_parameters=GONE, rope_theta=value)
                else:
                    changed(m / "config.json", **{field: value})

            words = (field,) if expect == REFUSED and name != "huge" else ()
            yield model_case("modelconfig", f"{field}-{name}", change, expect, words, rng.random())
    others = {
        "model_type": (GONE, None, "", "gpt2", "mystery", 3, ["llama"], "LLAMA"),
        "architectures": (["GPT2LMHeadModel"], "LlamaForCausalLM", 3, [3], [None], [["a"]], {"a": 1}),
        "hidden_act": ("gelu", None, 3, ["silu"], "SiLU"),
        "rope_parameters": ("x", 3, [], ["a"], {"rope_type": "yarn"}, {"rope_type": 3}, {"rope_type": ["default"]},
                            {"rope_type": "linear"}, {"rope_type": "linear", "factor": float("nan")},
                            {"rope_type": "linear", "factor": float("inf")},
                            {"rope_type": "linear", "factor": "2"}, {"rope_type": "linear", "factor": 0},
                            {"rope_type": "llama3", "factor": 8}, {"rope_type": "default", "rope_theta": "x"},
                            {"rope_type": "default", "rope_theta": float("nan")}, {"rope_theta": -1},
                            {"rope_type": "default", "mystery": 2}, {"rope_type": "longrope", "factor": 2}),
        "rope_scaling": ({"type": "dynamic", "factor": 2}, {"type": "linear", "factor": 2}, "linear", 3),
        "sliding_window": (4, "x"),
        "attention_dropout": (0.1, "x"),
        "quantization_config": ({"bits": 4},),
        "partial_rotary_factor": (0.5, "x", float("nan")),
        "logit_scale": (2.0,),
        "num_local_experts": (8,),
        "id2label": ({"0": "a", "1": "b"}, 3, "x", []),
        "eos_token_id": ("x", -1, 10**9, 2.5, [], [None], ["</s>"], [[2]], {"a": 1}, float("nan"), True),
        "bos_token_id": ("x", -1, 10**9, [1]),
        "pad_token_id": ("x", -1, 10**9, 2.5),
        "dtype": ("float8", 3, None),
    }  # fmt: skip
    harmless = {"model_type": (), "hidden_act": (None,), "id2label": ({"0": "a", "1": "b"}, 3, "x", [])}
    harmless |= {name: others[name] for name in ("bos_token_id", "pad_token_id", "dtype")}
    accepted = {("rope_parameters", 2), ("eos_token_id", 1), ("eos_token_id", 4), ("rope_scaling", 1)}
    for field, wrong in others.items():
        for number, value in enumerate(wrong):
            soft = value in harmless.get(field, ()) or (field, number) in accepted
            head = field in ("id2label",)

            def change(m, field=field, value=value):
                changed(m / "config.json", **{field: value})

            how = 0.0 if field == "eos_token_id" else rng.random()
            expect = SOUND if soft or head else REFUSED
            if field == "architectures" and number == 1:
                expect = SOUND
            words = (field,) if expect == REFUSED else ()
            if field == "rope_parameters":
                words = ("rope",) if expect == REFUSED else ()
            yield model_case("modelconfig", f"{field}-{number}", change, expect, words, how)


def _files(rng):
    """config.json and its neighbours as files."""
    texts = {
        "empty": b"",
        "binary": bytes(range(256)),
        "list": b"[]",
        "number": b"3",
        "null": b"null",
        "text": b'"x"',
        "object": b"{}",
        "cut": b'{"model_type": "llama", "hidden_si',
        "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
        "latin-1": '{"model_type": "llamé"}'.encode("latin-1"),
        "deep": b"[" * 100_000,
        "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
        "html": b"<html>404</html>",
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
        "trailing-comma": b'{"model_type": "llama",}',
    }
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        for name, data in texts.items():

            def change(m, file=file, data=data):
                (m / file).write_bytes(data)

            fine = name == "object" and file in ("generation_config.json", "tokenizer_config.json")
            soft = fine or (file == "tokenizer_config.json" and name in ("list", "null", "digits"))
            soft = soft or (file == "generation_config.json" and name == "digits")
            expect = SOUND if soft else REFUSED
            words = (file,) if expect == REFUSED else ()
            how = rng.choice((0.0, 0.8, 0.9))
            yield model_case("modelconfig", f"file-{file}-{name}", change, expect, words, how)
    for file in ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        for name, change in {
            "gone": lambda p: p.unlink(),
            "directory": lambda p: (p.unlink(), p.mkdir()),
            "dangling": lambda p: (p.unlink(), p.symlink_to("gone")),
            "loop": lambda p: (p.unlink(), p.symlink_to(p.name)),
        }.items():
            soft = file == "tokenizer_config.json"
            yield model_case(
                "modelconfig",
                f"path-{file}-{name}",
                lambda m, c=change, f=file: c(m / f),
                SOUND if soft else REFUSED,
                () if soft else (file,),
                rng.choice((0.0, 0.9)),
            )
    for field, flag, algorithm in (
        ("algorithm.reference_path", "algorithm.reference_path", "dpo"),
        ("rewards.model", "rewards.model", "ppo"),
        ("algorithm.value_path", "algorithm.value_path", "ppo"),
        ("model.tokenizer", "model.tokenizer", "sft"),
    ):
        for name, text in (("cut", '{"model_type": "lla'), ("other", '{"model_type": "gpt2"}'), ("gone", None)):

            def make(place, field=field, algorithm=algorithm, text=text):
                m = copied(place, "model-rm" if "rewards" in field else "model")
                if field == "model.tokenizer":
                    file = m / "tokenizer.json"
                else:
                    file = m / "config.json"
                file.unlink() if text is None else file.write_text(text)
                lines = [f"c.{field} = 'm'"] + ["c.rewards.function = None"] * (field == "rewards.model")
                return train(place, algorithm, *lines)

            yield Case("modelconfig", f"role-{field}-{name}", make, REFUSED, (flag,))


def edit(m: Path, change) -> None:
    """The tensors of a model, changed and written back."""
    from safetensors.numpy import load_file, save_file

    tensors = dict(load_file(m / "model.safetensors"))
    save_file(change(tensors) or tensors, m / "model.safetensors")


def _tensors():
    import numpy as np

    q = "model.layers.0.self_attn.q_proj.weight"
    embed, norm = "model.embed_tokens.weight", "model.norm.weight"

    def of(name, array):
        return lambda t: t.update({name: array(t[name])})

    edits = {
        "missing": (lambda t: {k: v for k, v in t.items() if k != q}, REFUSED, (q,)),
        "missing-norm": (lambda t: {k: v for k, v in t.items() if k != norm}, REFUSED, (norm,)),
        "missing-embedding": (lambda t: {k: v for k, v in t.items() if k != embed}, REFUSED, (embed,)),
        "nothing": (lambda t: {"x": t[norm]}, REFUSED, ()),
        "unknown": (lambda t: {**t, "model.mystery.weight": t[norm]}, REFUSED, ("mystery",)),
        "harmless": (lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": t[norm]}, RUNS, ()),
        "more-layers": (lambda t: {**t, q.replace("0", "7"): t[q]}, REFUSED, ("7",)),
        "head-beside-tied": (lambda t: {**t, "lm_head.weight": t[embed] + 1}, REFUSED, ("lm_head",)),
        "head-equal-tied": (lambda t: {**t, "lm_head.weight": t[embed]}, RUNS, ()),
        "head-alone-tied": (
            lambda t: {("lm_head.weight" if k == embed else k): v for k, v in t.items()}, RUNS, ()
        ),
        "bias": (lambda t: {**t, q.replace("weight", "bias"): np.ones(16, np.float32)}, REFUSED, ("bias",)),
        "transposed": (of("model.layers.0.mlp.up_proj.weight", lambda a: a.T.copy()), REFUSED, ("up_proj",)),
        "flat": (of(q, lambda a: a.ravel()), REFUSED, (q,)),
        "scalar": (of(norm, lambda a: np.ones((), np.float32)), REFUSED, (norm,)),
        "empty": (of(norm, lambda a: a[:0]), REFUSED, (norm,)),
        "longer": (of(norm, lambda a: np.ones(17, np.float32)), REFUSED, (norm,)),
        "integers": (of(q, lambda a: np.zeros(a.shape, np.int32)), REFUSED, (q,)),
        "bytes": (of(q, lambda a: np.zeros(a.shape, np.int8)), REFUSED, (q,)),
        "double": (of(q, lambda a: a.astype(np.float64)), SOUND, ()),
        "half": (of(q, lambda a: a.astype(np.float16)), RUNS, ()),
        "nan": (of(q, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a)), REFUSED, (q,)),
        "inf": (of(norm, lambda a: a * np.float32("inf")), REFUSED, (norm,)),
        "all-nan": (of(embed, lambda a: a * np.nan), REFUSED, (embed,)),
        "huge": (of(q, lambda a: np.full_like(a, 3e38)), SOUND, ()),
        "zeros": (lambda t: {k: v * 0 for k, v in t.items()}, SOUND, ()),
        "prefix": (lambda t: {f"transformer.{k}": v for k, v in t.items()}, REFUSED, ()),
        "module-prefix": (lambda t: {f"module.{k}": v for k, v in t.items()}, REFUSED, ()),
        "lora": (lambda t: {**t, "base_model.model.lora_A.weight": t[norm]}, REFUSED, ("lora",)),
    }  # fmt: skip
    for name, (change, expect, words) in edits.items():
        for how, kind in ((0.0, "generate"), (0.9, "train")):
            yield model_case("weights", f"{name}-{kind}", lambda m, c=change: edit(m, c), expect, words, how)

    def data(change):
        return lambda m: (m / "model.safetensors").write_bytes(change((m / "model.safetensors").read_bytes()))

    def header(change):
        def edited(raw):
            (length,) = struct.unpack("<Q", raw[:8])
            text = change(json.loads(raw[8 : 8 + length]))
            text = text if isinstance(text, bytes) else json.dumps(text).encode()
            return struct.pack("<Q", len(text)) + text + raw[8 + length :]

        return data(edited)

    def one(**fields):
        return header(lambda h: {**h, norm: {**h[norm], **fields}})

    broken = {
        "file-empty": data(lambda d: b""),
        "file-7-bytes": data(lambda d: d[:7]),
        "file-8-bytes": data(lambda d: d[:8]),
        "file-half": data(lambda d: d[: len(d) // 2]),
        "file-but-a-byte": data(lambda d: d[:-1]),
        "file-in-header": data(lambda d: d[:100]),
        "file-longer": data(lambda d: d + b"x" * 100),
        "file-random": data(lambda d: random.Random(0).randbytes(len(d))),
        "file-zeros": data(lambda d: bytes(len(d))),
        "file-lfs": data(lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        "file-pickle": data(lambda d: b"PK\x03\x04" + d),
        "header-huge": data(lambda d: struct.pack("<Q", 2**63) + d[8:]),
        "header-list": header(lambda h: []),
        "header-number": header(lambda h: 3),
        "header-cut": header(lambda h: json.dumps(h).encode()[:-5]),
        "header-empty": header(lambda h: {}),
        "header-binary": header(lambda h: bytes(range(256))),
        "header-deep": header(lambda h: b"[" * 100_000),
        "entry-null": header(lambda h: {**h, norm: None}),
        "entry-empty": header(lambda h: {**h, norm: {}}),
        "dtype-unknown": one(dtype="F7"),
        "dtype-number": one(dtype=3),
        "dtype-float8": one(dtype="F8_E4M3"),
        "shape-negative": one(shape=[-16]),
        "shape-text": one(shape="16"),
        "shape-huge": one(shape=[2**40]),
        "shape-part": one(shape=[16.5]),
        "shape-nan": one(shape=[float("nan")]),
        "offsets-outside": one(data_offsets=[0, 2**40]),
        "offsets-reversed": one(data_offsets=[64, 0]),
        "offsets-negative": one(data_offsets=[-64, 0]),
        "offsets-three": one(data_offsets=[0, 64, 128]),
        "offsets-text": one(data_offsets="x"),
        "offsets-overlap": header(lambda h: {**h, norm: {**h[norm], "data_offsets": [0, 64]}}),
        "metadata-list": header(lambda h: {**h, "__metadata__": [1]}),
    }
    for name, change in broken.items():
        expect = SOUND if name in ("metadata-list", "offsets-overlap") else REFUSED
        yield model_case("weights", name, change, expect, ("safetensors",) if expect == REFUSED else ())
    index = {
        "index-empty": "",
        "index-list": "[]",
        "index-no-map": "{}",
        "index-map-list": '{"weight_map": []}',
        "index-map-empty": '{"weight_map": {}}',
        "index-map-number": '{"weight_map": {"a": 3}}',
        "index-shard-gone": '{"weight_map": {"model.norm.weight": "gone.safetensors"}}',
        "index-outside": '{"weight_map": {"model.norm.weight": "../world/model.safetensors"}}',
        "index-of-one": '{"weight_map": {"model.norm.weight": "a.safetensors"}}',
    }
    for name, text in index.items():

        def change(m, text=text):
            (m / "model.safetensors").rename(m / "a.safetensors")
            (m / "model.safetensors.index.json").write_text(text)

        yield model_case("weights", name, change)

    def twice(m):
        shutil.copy(m / "model.safetensors", m / "a.safetensors")
        (m / "model.safetensors").rename(m / "b.safetensors")
        names = [norm, q]
        where = {"weight_map": {norm: "a.safetensors", q: "b.safetensors"}}
        assert names
        (m / "model.safetensors.index.json").write_text(json.dumps(where))

    yield model_case("weights", "shards-twice", twice)
    yield model_case("weights", "pytorch-only", lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"))


def _training():
    """What a model does not allow a run to do."""

    def short(place):
        changed(copied(place) / "config.json", max_position_embeddings=16)

    runs = {
        "beyond-positions": (short, ("c.data.max_length = 64",), WARNS, ("16",)),
        "float64": (copied, ("c.model.dtype = 'float64'",), REFUSED, ("float64",)),
        "param-float64": (copied, ("c.model.param_dtype = 'float64'",), REFUSED, ("float64",)),
        "revision": (copied, ("c.model.revision = 'main'",), REFUSED, ("revision",)),
        "from-scratch-no-config": (
            lambda p: (copied(p) / "config.json").unlink(), ("c.model.from_scratch = True",), REFUSED, ("config.json",)
        ),
        "layers-absurd": (
            lambda p: changed(copied(p) / "config.json", num_hidden_layers=10**9),
            ("c.model.from_scratch = True",), REFUSED, (),
        ),
        "width-absurd": (
            lambda p: changed(copied(p) / "config.json", hidden_size=10**9, head_dim=8),
            ("c.model.from_scratch = True",), REFUSED, (),
        ),
        "vocabulary-absurd": (
            lambda p: changed(copied(p) / "config.json", vocab_size=10**12),
            ("c.model.from_scratch = True",), REFUSED, (),
        ),
        "vocabulary-small": (
            lambda p: changed(copied(p) / "config.json", vocab_size=64),
            ("c.model.from_scratch = True",), REFUSED, ("vocabulary",),
        ),
    }  # fmt: skip
    for name, (prepare, lines, expect, words) in runs.items():
        for algorithm in ("sft", "ppo"):
            if name == "beyond-positions" and algorithm == "ppo":
                continue

            def make(place, prepare=prepare, lines=lines, algorithm=algorithm):
                prepare(place)
                return train(place, algorithm, "c.model.path = 'm'", *lines, dry=True)

            yield Case("modelconfig", f"run-{name}-{algorithm}", make, expect, words)
