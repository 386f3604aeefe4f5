"""Tunix's PeftTrainer and DPOTrainer; the stream of batches takes the turns."""

from turns import Turns

turns = Turns()

import jax  # noqa: E402

turns.count_compilation()

import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.sft import peft_trainer  # noqa: E402
from tunix.sft import utils as sft_utils  # noqa: E402
from tunix.sft.dpo import dpo_trainer  # noqa: E402

turns.imported("google-tunix", "jax", "jaxlib", "flax", "optax")
case, shape = turns.case, turns.case["shape"]


def make_model():
    config = llama.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab"],
        embed_dim=shape["hidden"],
        hidden_dim=shape["ffn"],
        num_heads=shape["heads"],
        head_dim=shape["hidden"] // shape["heads"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=llama.RematConfig.NONE,
    )
    return llama.Llama3(config, rngs=nnx.Rngs(0))


def batches(fields: dict[str, np.ndarray], make):
    """Batches without end; masks are all ones, since lengths are equal."""
    size, count = case["batch"], len(next(iter(fields.values()))) // case["batch"]
    index = 0
    while True:
        start = index % count * size
        yield make(**{name: values[start : start + size] for name, values in fields.items()})
        index += 1


def in_turns(model, stream):
    """The stream, held up where a turn ends until all steps so far are done."""
    for step, batch in enumerate(stream):
        if step == 1 or (step > 1 and step % turns.steps == 0):
            jax.block_until_ready(nnx.state(model))
            turns.after_step(step)
        yield batch


def sft(model, optimizer):
    ids = np.asarray([r["ids"] for r in turns.records()], np.int32)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=10**6)

    def inputs(x):
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(x.input_mask),
            "attention_mask": sft_utils.make_causal_attn_mask(x.input_mask),
        }

    def make(ids):
        return peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones(ids.shape, bool))

    trainer = peft_trainer.PeftTrainer(model, optimizer, config).with_gen_model_input_fn(inputs)
    return trainer, batches({"ids": ids}, make)


def dpo(model, optimizer):
    records = turns.records()
    fields = {name: np.asarray([r[name] for r in records], np.int32) for name in ("prompt", "chosen", "rejected")}
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=10**6, beta=0.1)

    def make(**ids):
        given = {f"{name}_ids": value for name, value in ids.items()}
        given |= {f"{name}_mask": np.ones(value.shape, np.int32) for name, value in ids.items()}
        return dpo_trainer.TrainingInput(**given)

    return dpo_trainer.DPOTrainer(model, make_model(), optimizer, config), batches(fields, make)


def main() -> None:
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = make_model()
        # The other trainers clip gradients to a norm of 1 by default; this one takes the optimizer as it is.
        trainer, stream = {"sft": sft, "dpo": dpo}[case["task"]](model, optax.adamw(1e-4))
        trainer.train(in_turns(model, stream), None)


main()
