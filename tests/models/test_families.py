"""A family is one file: a small one in this file is loaded and saved, with fused tensors and experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.errors import InputError
from jaxalign.models import export, families, hf, weights
from jaxalign.models.config import from_hf, read_config
from jaxalign.models.export import only_here
from jaxalign.models.families import llama
from jaxalign.models.hf_names import Names, Row, sizes
from jaxalign.models.transformer import Model
from jaxalign.models.weights import list_tensors
from jaxalign.ops.readout import scalar_readout
from jaxalign.ops.rope import Rope
from jaxalign.types import Rows
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

_FUSED = {"q_proj.weight": "qkv", "k_proj.weight": "qkv", "v_proj.weight": "qkv"}
_FUSED |= {"gate_proj.weight": "gate_up", "up_proj.weight": "gate_up"}


def _renamed(row: Row) -> Row:
    for suffix, fused in _FUSED.items():
        if row.name.endswith(suffix):
            return dataclasses.replace(row, name=row.name.removesuffix(suffix) + f"{fused}.weight")
    return row


_EXPERTS = (
    # Stored with the inputs first, gate and up side by side.
    Row("model.layers.{layer}.experts.{expert}.gate_up", "layers/experts/gate/kernel", "DF -> DF", along=1),
    Row("model.layers.{layer}.experts.{expert}.gate_up", "layers/experts/up/kernel", "DF -> DF", along=1),
    Row("model.layers.{layer}.experts.{expert}.down", "layers/experts/down/kernel", "DF -> FD"),
)
_PLAIN = llama.FAMILY.names.rows
_LAST = [row for row in _PLAIN if row.path in ("norm/scale", "lm_head/kernel", "score/kernel")]
_LAYERS = sorted(
    (_renamed(row) for row in _PLAIN if row.path.startswith("layers/")),
    key=lambda row: next((i for i, kind in enumerate(("qkv", "gate_up")) if kind in row.name), 2),
)
FAKE = dataclasses.replace(
    llama.FAMILY,
    name="Fake",
    model_types=("fake",),
    architectures={"lm": "FakeForCausalLM", "score": "FakeForSequenceClassification"},
    names=Names(_PLAIN[0], *_LAYERS, *_EXPERTS, *_LAST),
)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, FAKE])
    return tiny.hf_config(model_type="fake", architectures=["FakeForCausalLM"], tie_word_embeddings=False)


def _by_leaf(tree):
    return {"/".join(k.key for k in p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_fused_tensors_are_the_parts_side_by_side(tmp_path, fake):
    """The same numbers under either family's names give the same model, and each saves what it was loaded from."""
    plain = tiny.hf_config(tie_word_embeddings=False)
    tensors = tiny.tensors(plain)
    layer = "model.layers.{}.".format
    fused = {k: v for k, v in tensors.items() if not k.endswith(tuple(_FUSED))}
    for i in range(3):
        attention, mlp = layer(i) + "self_attn.", layer(i) + "mlp."
        fused[attention + "qkv.weight"] = np.concatenate([tensors[f"{attention}{n}_proj.weight"] for n in "qkv"])
        fused[mlp + "gate_up.weight"] = np.concatenate([tensors[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")])
    tiny.write(tmp_path / "plain", plain, tensors)
    tiny.write(tmp_path / "fused", fake, fused, max_bytes=20_000)
    model, params = hf.load(tmp_path / "fused", **tiny.SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(tmp_path / "plain", **tiny.SETTINGS)[1])
    hf.save(tmp_path / "again", model, params, source=tmp_path / "fused")
    again = {name: tensor.read() for name, tensor in list_tensors(tmp_path / "again").items()}
    assert again.keys() == fused.keys()
    for name, value in fused.items():
        np.testing.assert_array_equal(again[name], value)
    assert '"FakeForCausalLM"' in (tmp_path / "again" / "config.json").read_text()


def _with_experts(config, experts: int):
    """A tree with experts beside the mlp; the transformer knows none yet."""
    D, F, L = config.embed_dim, config.mlp_dim, config.num_layers
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    tree = Model(config).abstract()
    tree["layers"]["experts"] = {
        name: {"kernel": jax.ShapeDtypeStruct((L, experts, *shape), np.float32)} for name, shape in shapes.items()
    }
    return tree


@pytest.mark.parametrize("split", [None, P(None, "x"), P(None, None, "x"), P("x")])
def test_experts_are_stacked_behind_layers(tmp_path, fake, split):
    """Every tensor carries its layer's and its expert's number; a device reads what it holds, both ways."""
    config = from_hf(fake | {"num_hidden_layers": 4}, **tiny.SETTINGS)
    abstract = _with_experts(config, 2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    tiny.write(tmp_path, fake | {"num_hidden_layers": 4}, {})
    weights.write_tensors(tmp_path, dict(export._planned(Model(config), params)), np.dtype(np.float32), 10**9)
    tensors = list_tensors(tmp_path)
    gate, up = (params["layers"]["experts"][name]["kernel"][3, 1] for name in ("gate", "up"))
    np.testing.assert_array_equal(
        tensors["model.layers.3.experts.1.gate_up"].read(), np.concatenate([gate, up], axis=1)
    )
    mesh = Mesh(np.array(jax.devices()[:2]), "x")

    def shardings(tree):
        def place(path, _):
            experts = split is not None and "experts" in str(path)
            return NamedSharding(mesh, split if experts else P())

        return jax.tree_util.tree_map_with_path(place, tree)

    read = dict((path, array) for path, _, array in hf.read_leaves(tmp_path, config, abstract, shardings))
    for path, value in _by_leaf(params).items():
        np.testing.assert_array_equal(np.asarray(read[path]), value)
    if split is not None and len(mesh.devices) > 1:
        leaf = read["layers/experts/up/kernel"]
        assert leaf.addressable_shards[0].data.size * 2 == leaf.size


@pytest.mark.parametrize("name, words", [("experts.2.down", "does not have"), ("experts.0.down", "no model.layers")])
def test_an_expert_too_many_or_too_few_is_named(tmp_path, fake, name, words):
    config = from_hf(fake, **tiny.SETTINGS)
    shapes = {f: FAKE.names.in_order(_shapes(_with_experts(config, n))) for f, n in (("all", 3), ("two", 2))}
    tensors = {}
    for fused, index in shapes["all" if "2" in name else "two"]:
        if "2" in name or not fused.rows[0].named(index).endswith(name):
            tensors[fused.rows[0].named(index)] = np.zeros(fused.shape(sizes(config)), np.float32)
    tiny.write(tmp_path, fake, tensors)
    with pytest.raises(InputError, match=words) as error:
        list(hf.read_leaves(tmp_path, config, _with_experts(config, 2)))
    assert "experts." in str(error.value)


def _shapes(tree):
    return {path: x.shape for path, x in _by_leaf(jax.tree.map(lambda x: np.zeros(x.shape), tree)).items()}


def test_an_unknown_family_is_named_with_those_there_are(tmp_path):
    tiny.write(tmp_path, tiny.hf_config(model_type="unheard_of"), {})
    with pytest.raises(InputError) as error:
        read_config(tmp_path, **tiny.SETTINGS)
    assert "'unheard_of'" in str(error.value) and all(repr(t) in str(error.value) for t in llama.FAMILY.model_types)


@pytest.mark.parametrize("kind", families.REFUSED)
def test_what_is_refused_has_a_reason_and_a_nearest_that_loads(kind):
    with pytest.raises(InputError) as error:
        from_hf(tiny.hf_config(model_type=kind), **tiny.SETTINGS)
    assert repr(kind) in str(error.value) and "model.path" in error.value.fix
    assert not any(kind in family.model_types for family in families.FAMILIES)


def test_quantised_weights_are_refused_by_their_method():
    with pytest.raises(InputError, match="quantization_config 'gptq'"):
        from_hf(tiny.hf_config(quantization_config={"quant_method": "gptq", "bits": 4}), **tiny.SETTINGS)


def read(case, **changes):
    fields = {k: v for k, v in (CASES[case] | changes).items() if v != "absent"}
    return from_hf(fields, **tiny.SETTINGS)


SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "case, changes, windows",
    [
        ("qwen2", {}, None),
        ("qwen2_windows", {}, (None, 7, 7)),
        ("qwen2_windows", {"max_window_layers": 0}, (7, 7, 7)),
        ("qwen2_windows", {"max_window_layers": "absent"}, None),  # 28
        ("qwen2_windows", {"sliding_window": None}, None),
        ("qwen3_windows", {"sliding_window": "absent"}, (None, 4096, 4096)),
        ("mistral", {"sliding_window": "absent"}, (4096, 4096, 4096)),
        ("mistral", {"layer_types": [SLIDES] * 3}, (9, 9, 9)),
        ("mistral_no_window", {"layer_types": [FULL] * 3}, None),
        ("ministral", {}, (6, None, 6)),
        ("ministral", {"layer_types": None}, (6, 6, 6)),
        ("gemma2", {}, (6, None, 6)),
        ("gemma2", {"sliding_window": None}, None),
        ("gemma2_uncapped", {"sliding_window": "absent"}, (4096, None, 4096)),
        ("ministral", {"layer_types": "absent", "sliding_window": None}, None),
        ("olmo3", {}, (None, 6, 6)),
        ("olmo3_by_type", {}, (5, 5, 5, None)),
        ("smollm3", {"sliding_window": 7}, None),
        ("smollm3_windows", {}, (None, 6, None)),
        ("smollm3_windows", {"sliding_window": None}, None),
        ("gemma3", {}, (6, 6, None)),
        ("gemma3", {"sliding_window_pattern": 2}, (6, None, 6)),
        ("gemma3", {"sliding_window_pattern": "absent"}, (6, 6, 6)),
        ("gemma3", {"layer_types": [FULL] * 3, "sliding_window": None}, None),
    ],
)
def test_windows_of_config_json(case, changes, windows):
    """What is absent is what transformers' class has there."""
    assert read(case, **changes).windows == windows


@pytest.mark.parametrize(
    "case, field, value",
    [
        ("qwen2", "layer_types", [SLIDES] * 3),  # use_sliding_window is false
        ("qwen2_windows", "layer_types", [SLIDES] * 2),
        ("qwen2_windows", "layer_types", [SLIDES, FULL, "chunked_attention"]),
        ("qwen2_windows", "sliding_window", 0),
        ("qwen2_windows", "max_window_layers", -1),
        ("qwen2_windows", "use_sliding_window", "yes"),
        ("qwen2", "attention_bias", True),
        ("mistral", "layer_types", [SLIDES, FULL, SLIDES]),
        ("mistral", "use_qk_norm", True),
        ("qwen3", "mlp_bias", True),
        ("gemma", "hidden_act", "relu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "final_logit_softcapping", -1),
        ("olmo3", "rope_theta", 1e6),
        ("olmo3", "rope_local_base_freq", 1e4),
        ("smollm3", "no_rope_layers", [1, 0]),
        ("smollm3", "no_rope_layers", [1, 0, 2]),
        ("smollm3", "no_rope_layer_interval", 0),
        ("smollm3", "layer_types", [SLIDES] * 3),  # use_sliding_window is false
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gpt_neox", "hidden_act", "relu"),
        ("gpt_neox", "num_key_value_heads", 2),
        ("gpt_neox", "hidden_dropout", 0.1),
        ("gpt_neox", "rotary_pct", 2.0),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "n_positions", 0),
        ("gpt2", "hidden_size", 32),  # it is n_embd
        ("gemma3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("gemma3", "rope_local_base_freq", "1e4"),
        ("gemma3", "sliding_window_pattern", 0),
        ("gemma3", "sliding_window", None),
        ("phi3_long", "partial_rotary_factor", 1e308),
    ],
)
def test_a_field_that_a_family_does_not_honour_is_named(case, field, value):
    with pytest.raises(InputError, match=field):
        read(case, **{field: value})


@pytest.mark.parametrize(
    "case",
    ["olmo2", "gemma", "gemma2", "gemma3", "olmo3", "smollm3_windows", "phi3_long", "granite", "gpt_neox", "gpt2"],
)
def test_packed_rows_pairs_and_a_cache_equal_a_sequence_alone(case, x64):
    """Of a family with parts of its own; float64."""
    model = Model(from_hf(CASES[case], **tiny.SETTINGS | {"dtype": "float64", "param_dtype": "float64"}))
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)
    forward = jax.jit(lambda rows, cache=None: model.apply(params, rows, cache)[:2])
    first, second = np.random.default_rng(0).integers(0, 64, (2, 1, 17))
    alone = forward(tiny.causal(second))[0]
    rows = tiny.causal(np.concatenate([first, second], axis=1))
    start = np.repeat([0, 17], 17)[None].astype(np.int32)
    packed = rows._replace(positions=rows.positions - start, attend_start=start)
    np.testing.assert_allclose(forward(packed)[0][:, 17:], alone, rtol=0, atol=1e-9)
    rejected = np.concatenate([second[:, :7], first[:, 7:]], axis=1)  # of a pair around a prompt of 7 tokens
    order = np.concatenate([second[:, :6:-1], rejected], axis=1)
    index = np.arange(27)
    fields = (16 - index, index - 10), (index, 10), (17, index + 1)  # positions, starts, ends: chosen first
    fields = (np.where(index < 10, *field) for field in fields)
    pair = forward(Rows(*(np.asarray(x, np.int32).reshape(1, 27) for x in (order, *fields))))[0]
    np.testing.assert_allclose(pair[:, 10:], forward(tiny.causal(rejected))[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(pair[:, 9::-1], alone[:, 7:], rtol=0, atol=1e-9)
    cache, rows = tiny.empty_cache(model.config, 1, 17), tiny.causal(second)
    for part in (slice(0, 12), *(slice(t, t + 1) for t in range(12, 17))):
        found, cache = forward(jax.tree.map(lambda x, part=part: x[:, part], rows), cache)
        np.testing.assert_allclose(found, alone[:, part], rtol=0, atol=1e-9)


def test_layers_turn_by_their_type():
    """What is absent is what transformers' class has there; a window's layers are not scaled with the others."""
    local, scaled = Rope(theta=5.0), Rope("linear", 50.0, 2.0)
    assert read("gemma3").ropes == (local, local, scaled)
    gone = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq"), "absent")
    assert read("gemma3", **gone).ropes == (Rope(theta=1e4), Rope(theta=1e4), Rope(theta=1e6))
    types = {"full_attention": None, "sliding_attention": {"rope_type": "default"}}
    assert read("gemma3", **gone, rope_parameters=types).ropes == (Rope(theta=1e4), Rope(theta=1e4), Rope(theta=1e6))
    assert {rope.kind for rope in read("olmo3").ropes[1:]} == {"default"} != read("olmo3").ropes[0].kind == "yarn"
    assert [rope.theta for rope in read("olmo3_by_type").ropes] == [30.0, 30.0, 30.0, 100.0]
    assert read("olmo3", rope_theta="absent", rope_scaling=None).ropes == (Rope(theta=5e5),) * 3
    assert read("smollm3").ropes == (Rope(theta=100.0), None, Rope(theta=100.0))
    assert read("smollm3", no_rope_layers="absent", rope_theta="absent").ropes == (Rope(theta=2e6),) * 3
    assert read("smollm3", no_rope_layers="absent", num_hidden_layers=8).ropes[3::4] == (None, None)
    assert read("gemma3_by_type").ropes == (Rope(theta=70.0), *[Rope("linear", 8.0, 3.0)] * 2)


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_is_bitwise(tmp_path, case):
    """In the file's own dtype; another number of shards."""
    tensors = {name: value.astype("bfloat16") for name, value in tiny.tensors(CASES[case]).items()}
    tiny.write(tmp_path / "in", CASES[case], tensors, "bfloat16", max_bytes=10_000)
    model, params = hf.load(tmp_path / "in", **tiny.SETTINGS | {"param_dtype": "bfloat16"})
    hf.save(tmp_path / "out", model, params)
    found = {name: tensor.read() for name, tensor in list_tensors(tmp_path / "out").items()}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].tobytes() == value.tobytes(), name


def test_the_rope_of_first_files():
    """Phi-3 of 128k tokens: another name of the type, the original length outside; 4,096 where no file says it."""
    changes = {"rope_parameters": None, "rope_theta": 1e4, "max_position_embeddings": 131072, "head_dim": None}
    scaling = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for kind in ("su", "yarn", "longrope"):
        rope = read("phi3", rope_scaling=scaling | {"type": kind}, **changes).rope
        assert (rope.kind, rope.original_length, rope.length) == ("longrope", 4096, 4096)
        assert rope.attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert read("phi3", rope_scaling=None, **changes).rope.kind == "default"
    read("phi3", full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, embd_pdrop=0.0)  # Phi-4-mini's own
    with pytest.raises(InputError, match="partial_rotary_factor"):
        read("phi3", partial_rotary_factor=0.4)  # 3 of 8 dims
    with pytest.raises(InputError, match="resid_pdrop"):
        read("phi3", resid_pdrop=0.1)


def test_a_reward_model_that_transformers_has_no_class_for(tmp_path):
    """It is saved and loaded here, and whoever saves one is told."""
    config = CASES["granite"] | {"architectures": ["GraniteForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    tiny.write(tmp_path / "in", config, tiny.tensors(config))
    model, params = hf.load(tmp_path / "in", **tiny.SETTINGS)
    assert model.config.head == "score"
    assert "transformers has no sequence classifier of Granite" in only_here(model.config)
    assert not only_here(read("granite")) and not only_here(read("phi3"))
    hf.save(tmp_path / "out", model, params)
    again, found = hf.load(tmp_path / "out", **tiny.SETTINGS)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, params)


CLASSIFIERS = [
    (family, kind) for family in families.FAMILIES for kind in ("score", "tokens") if kind in family.architectures
]


@pytest.mark.parametrize("family, kind", CLASSIFIERS, ids=lambda x: getattr(x, "name", x))
def test_classifiers_of_several_labels_leave_as_they_came(tmp_path, family, kind):
    """Bit for bit in bfloat16, with the names of their labels; a stage that wants one score says so."""
    labels = {"id2label": {"0": "good", "1": "bad", "2": "ugly"}, "label2id": {"good": 0, "bad": 1, "ugly": 2}}
    case = next(fields for fields in CASES.values() if fields["model_type"] in family.model_types)
    config = case | labels | {"architectures": [family.architectures[kind]], "tie_word_embeddings": True}
    tensors = {name: value.astype(jnp.bfloat16) for name, value in tiny.tensors(config).items()}
    tiny.write(tmp_path / "in", config, tensors, dtype=jnp.bfloat16)
    settings = tiny.SETTINGS | {"param_dtype": "bfloat16"}
    model, params = hf.load(tmp_path / "in", **settings)
    assert model.score_kernel(params).shape == (32, 3)
    assert ("bias" in params["score"]) == (kind == "tokens")
    fresh = jax.jit(model.init)(jax.random.key(0))["score"]
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params["score"])
    with pytest.raises(ValueError, match="kernel"):
        scalar_readout(np.zeros((1, 2, 32)), model.score_kernel(params), None)
    hf.save(tmp_path / "out", model, params, source=tmp_path / "in")
    out = {name: tensor.read() for name, tensor in list_tensors(tmp_path / "out").items()}
    assert out.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(out[name], value)
    again = read_config(tmp_path / "out", **settings)
    assert again == model.config
    assert {name: again.hf[name] for name in labels} == labels
    with pytest.raises(InputError, match="3 labels"):
        hf.load(tmp_path / "in", head="score", **tiny.SETTINGS)


def test_sizes_that_a_file_leaves_out():
    assert read("qwen3", head_dim="absent").head_dim == 128
    assert read("gemma", head_dim="absent", tie_word_embeddings="absent").tied
    plain = read("granite_biases", attention_multiplier="absent")
    assert (plain.attention_scale, plain.embed_scale, plain.residual_scale, plain.logit_scale) == (1, 1, 1, 1)
    assert read("gpt_neox", rotary_pct="absent").rope.dims == 2 and read("gpt_neox", rotary_pct=1.0).rope.dims is None
    assert read("gpt_neox", use_parallel_residual="absent").parallel and read("gpt_neox_serial").parallel is None
    assert read("gemma2", **{name: "absent" for name in CASES["gemma2"] if "softcapping" in name}).logit_softcap == 30
    assert read("mistral", head_dim="absent", num_attention_heads=8, num_key_value_heads="absent").num_kv_heads == 8
    assert read("gemma3", **dict.fromkeys(("head_dim", "vocab_size"), "absent")).vocab_size == 262_208
    assert read("mistral", num_key_value_heads=None).num_kv_heads == 4


def test_parts_of_a_tensor_follow_each_other():
    with pytest.raises(ValueError, match="parts"):
        Names(Row("a", "x", "D -> D"), Row("b", "y", "D -> D"), Row("a", "z", "D -> D"))
