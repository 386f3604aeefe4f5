"""SFT, DPO, IPO and the reward loss against TRL 1.16's trainers, run live on the same weights and ids."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as PairCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from jaxalign.models.hf import save
from jaxalign.ops.losses_preference import PREFERENCE_LOSSES
from tests.steps.peer_cases import (
    ALGORITHMS,
    BETA,
    CENTER,
    GOLDEN,
    MODELS,
    SMOOTHED,
    compare,
    examples_of,
    head_of,
    model_of,
    ours,
    sketch,
)

TEXT = "Once upon a time"
METRICS = [f"{group}/{side}" for group in ("rewards", "logps") for side in ("chosen", "rejected")]


def keep(prefix, values):
    """Stores values for the default tests, where asked to."""
    if os.environ.get("JAXALIGN_UPDATE_GOLDEN") == "1":
        golden = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        golden |= {prefix + key: np.asarray(value) for key, value in values.items()}
        np.savez_compressed(GOLDEN, **dict(sorted(golden.items())))


def torch_model(kind, name, which, head, shared, folder):
    """Our parameters, exported, as transformers reads them; float32, eager attention."""
    model, *params = model_of(name, head, shared)
    save(folder / which, model, params[which == "ref"])
    return kind.from_pretrained(folder / which, dtype=torch.float32, attn_implementation="eager")


def trainer_of(algorithm, model, ref, shared, folder, *, pairs=False):
    """TRL's trainer, in float32 and without gradient checkpointing (its defaults are the contrary)."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k-llama")
    args = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    if algorithm == "sft" and not pairs:
        data = Dataset.from_dict({"text": [TEXT]})
        return SFTTrainer(model, args=SFTConfig(**args), train_dataset=data, processing_class=tokenizer)
    data = Dataset.from_dict({"prompt": [TEXT], "chosen": [" there"], "rejected": [" was"]})
    if algorithm == "reward":
        data = data.remove_columns("prompt")
        args = RewardConfig(**args, center_rewards_coefficient=CENTER)
        return RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    args = DPOConfig(**args, beta=BETA, loss_type=[algorithm], **SMOOTHED.get(algorithm, {}))
    return DPOTrainer(model, ref_model=ref, args=args, train_dataset=data, processing_class=tokenizer)


def inputs_of(name, algorithm):
    """The examples as TRL's collators lay them: right-padded, chosen rows first."""
    many = examples_of(name, algorithm)
    if algorithm == "sft":
        longest = max(len(e.prompt + e.completions[0]) for e in many)
        ids, attention, labels = (torch.full((len(many), longest), fill) for fill in (0, 0, -100))
        for row, e in enumerate(many):
            n, p = len(e.prompt + e.completions[0]), len(e.prompt)
            ids[row, :n], attention[row, :n] = torch.tensor(e.prompt + e.completions[0]), 1
            labels[row, p:n] = ids[row, p:n]
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}
    if algorithm == "reward":
        rows = [
            {"chosen_ids": e.prompt + e.completions[0], "rejected_ids": e.prompt + e.completions[1], "margin": e.score}
            for e in many
        ]
        return RewardCollator(pad_token_id=0)(rows)
    rows = [{"prompt_ids": e.prompt, "chosen_ids": e.completions[0], "rejected_ids": e.completions[1]} for e in many]
    return PairCollator(pad_token_id=0)(rows)


def gradient_of(model):
    """torch's gradients under our names, laid out as our parameters."""
    c = model.config
    L, D, N, K, H = (
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.hidden_size // c.num_attention_heads,
    )
    raw = {name: p.grad.numpy() for name, p in model.named_parameters()}
    stack = lambda name: np.stack([raw[f"model.layers.{i}.{name}.weight"] for i in range(L)])  # noqa: E731
    turned = lambda name: stack(name).transpose(0, 2, 1)  # noqa: E731
    out = {
        "embed/embedding": raw["model.embed_tokens.weight"],
        "norm/scale": raw["model.norm.weight"],
        "layers/attention_norm/scale": stack("input_layernorm"),
        "layers/mlp_norm/scale": stack("post_attention_layernorm"),
        "layers/attention/query/kernel": turned("self_attn.q_proj").reshape(L, D, N, H),
        "layers/attention/key/kernel": turned("self_attn.k_proj").reshape(L, D, K, H),
        "layers/attention/value/kernel": turned("self_attn.v_proj").reshape(L, D, K, H),
        "layers/attention/out/kernel": turned("self_attn.o_proj").reshape(L, N, H, D),
        "layers/mlp/gate/kernel": turned("mlp.gate_proj"),
        "layers/mlp/up/kernel": turned("mlp.up_proj"),
        "layers/mlp/down/kernel": turned("mlp.down_proj"),
    }
    for name, path in (("lm_head", "lm_head/kernel"), ("score", "score/kernel")):
        if f"{name}.weight" in raw:
            out[path] = raw[f"{name}.weight"].T
    return out


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_trl(name, algorithm, shared, tmp_path):
    kind = LlamaForSequenceClassification if algorithm == "reward" else LlamaForCausalLM
    model, ref = (torch_model(kind, name, w, head_of(algorithm), shared, tmp_path) for w in ("policy", "ref"))
    trainer = trainer_of(algorithm, model, ref, shared, tmp_path / "run")
    model.eval()  # no dropout here anyway; TRL's metrics then go under "eval"
    inputs = inputs_of(name, algorithm)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    with torch.no_grad():
        if algorithm == "reward":
            items = model(**{k: v for k, v in inputs.items() if k != "margin"}).logits[:, 0]
        else:
            labels = inputs.get("labels")
            if labels is None:
                labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            target = labels[:, 1:]
            picked = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
            items = (picked * (target != -100)).sum(-1)
    items = items[:, None] if algorithm == "sft" else torch.stack(items.chunk(2), dim=1)
    peer = {"loss": loss.item(), "items": items.numpy()}
    logged = {key: values[-1] for key, values in trainer._metrics["eval"].items() if values}
    if algorithm in ("sigmoid", "ipo"):
        peer |= {f"metrics/{key}": logged[key] for key in [*METRICS, "rewards/margins", "rewards/accuracies"]}
    elif algorithm == "sft":
        peer["metrics/entropy"] = logged["entropy"]
    else:
        peer |= {"metrics/rewards/accuracies": logged["accuracy"], "metrics/rewards/margins": logged["margin"]}
    gradient = gradient_of(model)
    found = ours(name, algorithm, shared)
    assert {key.removeprefix("gradient/") for key in found if key.startswith("gradient/")} == set(gradient)
    compare(found, peer | {f"gradient/{path}": g for path, g in gradient.items()})

    if name == "tiny":
        peer |= {f"gradient/{path}": g for path, g in gradient.items()}
    else:
        peer |= {f"sketch/{path}": sketch(g) for path, g in gradient.items()}
        peer |= {f"norm/{path}": np.linalg.norm(g) for path, g in gradient.items()}
    keep(f"{name}/{algorithm}/", peer)


class Stub:
    """Stands where TRL expects a model, and returns given numbers, so that its loss runs in float64."""

    def __init__(self, trainer_model, **outputs):
        self.config, self.training, self.outputs = trainer_model.config, False, SimpleNamespace(**outputs)

    def __call__(self, **_):
        return self.outputs


@pytest.mark.parametrize(
    "algorithm", [name for name in PREFERENCE_LOSSES if name not in ("simpo", "orpo", "dpop", "rdpo")]
)
def test_preference_loss_on_the_same_logprobs(algorithm, shared, tmp_path):
    """float64 to 1e-12: TRL's own compute_loss, its model replaced by given log-probs."""
    model, ref = (torch_model(LlamaForCausalLM, "tiny", w, "lm", shared, tmp_path) for w in ("policy", "ref"))
    trainer = trainer_of(algorithm, model, ref, shared, tmp_path / "run", pairs=True)
    rng = np.random.default_rng(3)
    pairs, length = 9, 14
    mask = torch.zeros((2 * pairs, length + 1), dtype=torch.long)
    for row in mask:
        row[2 : 3 + rng.integers(0, length - 2)] = 1
    raw = [torch.tensor(-rng.exponential(2.0, (2 * pairs, length))) * mask[:, 1:] for _ in range(2)]
    policy = raw[0].clone().requires_grad_()
    filler = {"entropy": policy.detach(), "mean_logits": policy.detach(), "is_top1": mask[:, 1:] > 0}
    trainer.ref_model = Stub(model, log_probs=raw[1])
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    torch.set_default_dtype(torch.float64)  # exo_pair makes a tensor of its label_smoothing
    try:
        loss = trainer._compute_loss(Stub(model, log_probs=policy, **filler), inputs, False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float64
    loss.backward()
    halves = lambda x: np.stack(np.split(np.asarray(x), 2), axis=1)  # noqa: E731
    # the gradient of a sum is that of each scored token; the first scored one is at place 1
    peer = {
        "loss": loss.item(),
        "policy": halves(raw[0].sum(1)),
        "ref": halves(raw[1].sum(1)),
        "lengths": halves(mask.sum(1)),
        "gradient": halves(policy.grad[:, 1]),
    }
    keep(f"function/{algorithm}/", peer)
    import jax

    with jax.enable_x64(True):
        pair = lambda x: {"chosen": x[:, 0], "rejected": x[:, 1]}  # noqa: E731

        def mean(x):
            terms = PREFERENCE_LOSSES[algorithm](
                pair(x), pair(peer["ref"]), pair(peer["lengths"]), np.ones(pairs, bool), beta=BETA,
                **SMOOTHED.get(algorithm, {}),
            )  # fmt: skip
            return (terms.loss * terms.weight).sum() / terms.weight.sum()

        found, gradient = jax.value_and_grad(mean)(peer["policy"])
        np.testing.assert_allclose(found, peer["loss"], rtol=1e-12)
        np.testing.assert_allclose(gradient, peer["gradient"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_on_the_same_logprobs(name):
    """float64 to 1e-12: the losses of TRL's CPO and ORPO trainers, given log-probs averaged over tokens."""
    rng = np.random.default_rng(7)
    lengths = torch.tensor(rng.integers(1, 12, (9, 2)))
    policy = torch.tensor(-rng.exponential(1.0, (9, 2)) * lengths.numpy()).requires_grad_()
    means = (policy / lengths).T
    said = {"beta": BETA, "alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.0}
    trainer = SimpleNamespace(**said, accelerator=SimpleNamespace(device="cpu"))
    if name == "simpo":
        loss = CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    else:
        float32 = torch.Tensor.float
        torch.Tensor.float = lambda x: x  # it rounds what it is given
        try:
            loss = -ORPOTrainer.odds_ratio_loss(trainer, *means)[0].mean()
        finally:
            torch.Tensor.float = float32
    loss.backward()
    peer = {"loss": loss.item(), "policy": policy.detach().numpy(), "gradient": policy.grad.numpy()}
    peer |= {"ref": np.zeros((9, 2)), "lengths": lengths.numpy()}
    keep(f"function/{name}/", peer)
    import jax

    with jax.enable_x64(True):
        pair = lambda x: {"chosen": x[:, 0], "rejected": x[:, 1]}  # noqa: E731

        def mean(x):
            return PREFERENCE_LOSSES[name](
                pair(x), pair(peer["ref"]), pair(peer["lengths"]), np.ones(9, bool), beta=BETA
            ).loss.mean()

        found, gradient = jax.value_and_grad(mean)(peer["policy"])
        np.testing.assert_allclose(found, peer["loss"], rtol=1e-12)
        np.testing.assert_allclose(gradient, peer["gradient"], rtol=1e-12, atol=1e-15)


def test_reward_loss_on_the_same_scores(shared, tmp_path):
    import jax

    from jaxalign.ops.losses_reward import reward_loss

    model = torch_model(LlamaForSequenceClassification, "tiny", "policy", "score", shared, tmp_path)
    trainer = trainer_of("reward", model, None, shared, tmp_path / "run")
    rng = np.random.default_rng(4)
    values = torch.tensor(rng.normal(size=(18, 1))).requires_grad_()
    margin = torch.tensor(rng.normal(size=9))
    inputs = {"input_ids": torch.ones(18, 3), "attention_mask": torch.ones(18, 3), "margin": margin}
    loss = trainer.compute_loss(Stub(model, logits=values), inputs)
    loss.backward()
    halves = lambda x: np.stack(np.split(np.asarray(x)[:, 0], 2), axis=1)  # noqa: E731
    peer = {
        "loss": loss.item(),
        "scores": halves(values.detach()),
        "margin": margin.numpy(),
        "gradient": halves(values.grad),
    }
    keep("function/reward/", peer)
    with jax.enable_x64(True):

        def mean(x):
            mask = np.ones(len(x), bool)
            return reward_loss(x[:, 0], x[:, 1], mask, margin=peer["margin"], center_coef=CENTER).loss.mean()

        found, gradient = jax.value_and_grad(mean)(peer["scores"])
        np.testing.assert_allclose(found, peer["loss"], rtol=1e-12)
        np.testing.assert_allclose(gradient, peer["gradient"], rtol=1e-12, atol=1e-15)
