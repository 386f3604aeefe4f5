"""The models against transformers on torch; values are kept as golden files for the tests without torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxalign.models import hf
from jaxalign.models.transformer import Model
from jaxalign.ops.rope import BY_LENGTH
from tests.models import tiny_models as tiny
from tests.models.test_golden_models import FIXED_IDS, SHARED_MODELS, loss_and_grads, summary
from tests.models.test_rope import CASES

torch.set_num_threads(2)


def torch_model(directory, kind=transformers.AutoModelForCausalLM):
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def torch_loss_and_grads(model, tokens):
    ids = torch.tensor(np.asarray(tokens))
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
    return float(loss.detach()), logits.detach().numpy(), grads


def to_names(model: Model, tree) -> dict[str, np.ndarray]:
    return tiny.by_name(model.config, tree)


def check_same(model, params, oracle, tokens):
    """Logits to 1e-4, mean loss to 1e-5 relative, each gradient to 1e-4 by norm."""
    loss, logits, grads = loss_and_grads(model, params, tokens)
    their_loss, their_logits, their_grads = torch_loss_and_grads(oracle, tokens)
    their_grads = {model.config.family.names.own(name): grad for name, grad in their_grads.items()}
    np.testing.assert_allclose(logits, their_logits, rtol=0, atol=1e-4)
    assert float(loss) == pytest.approx(their_loss, rel=1e-5)
    mine = to_names(model, grads)
    assert mine.keys() == their_grads.keys()
    largest = max(np.linalg.norm(g) for g in their_grads.values())
    for name, theirs in their_grads.items():
        size = np.linalg.norm(theirs)  # 0: a window of 1 leaves a query nothing to choose
        assert np.linalg.norm(mine[name] - theirs) <= (1e-4 * size if size else 1e-7 * largest), name
    return their_loss, their_logits, their_grads


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_shared_models(shared, name):
    directory = shared / "models" / name
    model, params = hf.load(directory, **tiny.SETTINGS)
    tokens = FIXED_IDS[name]
    theirs = check_same(model, params, torch_model(directory), tokens)
    tiny.golden(name, lambda: summary(*theirs))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_variants_in_sharded_files_of_transformers(tmp_path, variant):
    """Weights from numpy, read by transformers, written by it in shards, read by jaxalign."""
    config = tiny.hf_config(**tiny.VARIANTS[variant])
    tiny.write(tmp_path / "numpy", config, tiny.tensors(config))
    oracle = torch_model(tmp_path / "numpy")
    oracle.save_pretrained(tmp_path / "torch", max_shard_size="20KB")
    assert len(list((tmp_path / "torch").glob("model-*.safetensors"))) > 2
    model, params = hf.load(tmp_path / "torch", **tiny.SETTINGS)
    theirs = check_same(model, params, oracle, FIXED_IDS["tiny"])
    tiny.golden(f"tiny_{variant}", lambda: summary(*theirs))


def test_rope_frequencies():
    def make():
        out = {}
        for case, fields in CASES.items():
            fields = {k: v for k, v in tiny.hf_config(**fields).items() if v is not None}
            config = transformers.LlamaConfig(**fields)
            kind = config.rope_parameters["rope_type"]
            default = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
            longest = {"seq_len": tiny.SETTINGS["rope_length"]} if kind in BY_LENGTH else {}
            out[case] = (default if kind == "default" else ROPE_INIT_FUNCTIONS[kind])(config, **longest)[0].numpy()
        return out

    live, stored = make(), tiny.golden("rope", make)
    assert all(np.array_equal(live[case], stored[case]) for case in CASES)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_export_generates_the_same_text(shared, tmp_path, name):
    """Load, add a change that shows, export, generate in transformers; and in jaxalign, greedily, token by token."""
    source = shared / "models" / name
    model, params = hf.load(source, **tiny.SETTINGS)
    params["norm"]["scale"] = params["norm"]["scale"] * 1.25
    hf.save(tmp_path / "out", model, params, source=source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time, there was a little", return_tensors="pt").input_ids
    theirs = torch_model(tmp_path / "out").generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    tokens = ids[0].tolist()
    step = jax.jit(lambda rows: model.apply(params, rows)[0] @ model.head(params))
    while len(tokens) < len(theirs):
        rows = tiny.causal([tokens], pad_right=40 - len(tokens))
        tokens.append(int(step(rows)[0, len(tokens) - 1].argmax()))
    assert tokens == theirs
    again, params_again = hf.load(tmp_path / "out", **tiny.SETTINGS)
    assert again == model
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_model_both_directions(tmp_path, side, tied):
    """A LlamaForSequenceClassification of transformers scores the same here, and one of ours there."""
    config = tiny.hf_config(architectures=["LlamaForSequenceClassification"], tie_word_embeddings=tied, num_labels=1)
    torch.manual_seed(0)
    oracle = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)).eval()
    torch.nn.init.normal_(oracle.score.weight)
    oracle.save_pretrained(tmp_path / "theirs")
    lengths, T, rng = [3, 9, 6], 9, np.random.default_rng(0)
    ids = np.zeros((3, T), np.int32)
    real = np.zeros((3, T), bool)
    for b, n in enumerate(lengths):
        real[b, T - n :] = True if side == "left" else real[b, T - n :]
        real[b, :n] = True if side == "right" else real[b, :n]
        ids[b, real[b]] = rng.integers(3, 64, n)

    def torch_scores(model):
        mask = torch.tensor(real.astype(np.int64))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(torch.tensor(ids).long(), attention_mask=mask, position_ids=positions).logits[:, 0].numpy()

    def my_scores(model, params):
        out = []
        for b, n in enumerate(lengths):
            pads = {"pad_left": T - n} if side == "left" else {"pad_right": T - n}
            hidden = model.apply(params, tiny.causal([ids[b, real[b]]], **pads))[0]
            out.append(float((hidden @ model.score_kernel(params))[0, np.flatnonzero(real[b])[-1], 0]))
        return out

    model, params = hf.load(tmp_path / "theirs", **tiny.SETTINGS)
    assert model.config.head == "score"
    np.testing.assert_allclose(my_scores(model, params), torch_scores(oracle), rtol=0, atol=1e-5)
    params["score"]["kernel"] = params["score"]["kernel"] * -2 + 0.1
    hf.save(tmp_path / "mine", model, params)
    back = torch_model(tmp_path / "mine", transformers.AutoModelForSequenceClassification)
    assert type(back).__name__ == "LlamaForSequenceClassification"
    np.testing.assert_allclose(torch_scores(back), my_scores(model, params), rtol=0, atol=1e-5)


def test_bfloat16_export_is_bitwise(shared, tmp_path):
    """transformers writes bfloat16, jaxalign reads and writes it: every tensor keeps its bits."""
    oracle = torch_model(shared / "models" / "stories260k-llama").to(torch.bfloat16)
    oracle.save_pretrained(tmp_path / "theirs")
    model, params = hf.load(tmp_path / "theirs", dtype="bfloat16", param_dtype="bfloat16", remat="none")
    hf.save(tmp_path / "mine", model, params)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert back.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(oracle.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert jnp.bfloat16 == params["norm"]["scale"].dtype
