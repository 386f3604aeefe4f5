"""TRL's SFT, DPO and reward trainers; a callback takes the turns."""

from turns import Turns, text

turns = Turns()

import torch  # noqa: E402

torch.set_num_threads(turns.threads)

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

turns.imported("trl", "torch", "transformers", "accelerate")
case, options = turns.case, turns.options
config = LlamaConfig.from_pretrained(f"{turns.directory}/model")
tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{turns.directory}/model")
torch.manual_seed(0)


class Callback(TrainerCallback):
    """Ends a turn after its last step."""

    trainer = None

    def on_step_end(self, args, state, control, **_):
        turns.after_step(state.global_step, (lambda: self.trainer._total_train_tokens) if case["ragged"] else None)


def arguments(batch: int) -> dict:
    """Defaults, but for shapes, float32 without recomputation, a constant rate, and no logs."""
    return {
        "output_dir": turns.scratch,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch,
        "max_steps": 10**6,
        "max_length": case["length"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "logging_steps": 10**6,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def sft(records, callback):
    """Token ids as they are; each step has as many real tokens as one of packed rows."""
    packing, batch = options.get("packing"), case["batch"]
    if case["ragged"] and not packing:
        mean = sum(len(r["ids"]) for r in records) / len(records)
        batch = round(batch * case["length"] / mean)
    more = {"packing": True, "packing_strategy": packing} if packing else {}
    more |= {"loss_type": options["loss_type"]} if "loss_type" in options else {}
    return trl.SFTTrainer(
        LlamaForCausalLM(config),
        peft_config=adapter() if case["rank"] else None,
        args=trl.SFTConfig(**arguments(batch), **more),
        train_dataset=Dataset.from_dict({"input_ids": [r["ids"] for r in records]}),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def adapter():
    """As jaxalign's: all linears of the layers, no dropout."""
    from peft import LoraConfig

    rank = case["rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def pairs(records, callback):
    """Text, which the trainers tokenise; they put EOS behind each completion."""
    columns = {"prompt": [text(r["prompt"]) + " " for r in records]}
    columns |= {side: [text(r[side][:-1]) for r in records] for side in ("chosen", "rejected")}
    common = {"train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer, "callbacks": [callback]}
    if case["task"] == "dpo":
        cached = case["reference"] == "cached"
        return trl.DPOTrainer(
            LlamaForCausalLM(config),
            # Without one the trainer takes the policy's start, and computes its log-probs before it trains.
            ref_model=None if cached else LlamaForCausalLM(config),
            args=trl.DPOConfig(**arguments(case["batch"]), beta=0.1, precompute_ref_log_probs=cached),
            **common,
        )
    config.num_labels = 1
    return trl.RewardTrainer(
        LlamaForSequenceClassification(config), args=trl.RewardConfig(**arguments(case["batch"])), **common
    )


def main() -> None:
    callback = Callback()
    records = turns.records()
    trainer = callback.trainer = (sft if case["task"] == "sft" else pairs)(records, callback)
    check(trainer, records)
    trainer.train()


def check(trainer, records) -> None:
    """Stops where the trainer's own preparation has made other tokens than the case has."""
    if case["ragged"]:
        return
    rows = next(iter(trainer.get_train_dataloader()))["input_ids"].tolist()
    if case["task"] == "sft":
        due = {tuple(r["ids"]) for r in records}
    else:
        due = {tuple(r["prompt"] + r[side]) for r in records for side in ("chosen", "rejected")}
    assert len(rows) == case["batch"] * (1 if case["task"] == "sft" else 2), len(rows)
    assert all(tuple(row) in due for row in rows), "rows that are no records of the case"


main()
