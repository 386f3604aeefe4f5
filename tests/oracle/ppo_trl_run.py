"""Runs TRL 1.12's own PPO trainer up to its first backward pass and stores its local variables.

    python ppo_trl_run.py DIRECTORY CASE.json OUT.npz

DIRECTORY holds the models; the JSON holds the settings, the prompts, the completions that take the place of sampled
ones, and noise for the old values.  Nothing of the trainer's arithmetic is replaced: sampling is (by the given
completions with the behaviour model's logits), and its value estimates get the noise.
"""

import contextlib
import json
import sys
import tempfile

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

KEPT = (
    *("logprobs", "ref_logprobs", "new_logprobs", "values", "vpred", "scores", "kl", "rewards", "advantages"),
    *("returns", "padding_mask", "padding_mask_p1", "pg_loss", "vf_loss", "vf_clipfrac"),
)


class Done(Exception):
    """The first backward pass has been made."""


def tokenizer(vocab_size):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, vocab_size)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")))
    made.pad_token, made.eos_token, made.padding_side = "<pad>", "</s>", "left"
    return made


def main(directory, case_file, out):
    torch.set_num_threads(1)
    with open(case_file) as f:
        case = json.load(f)
    c, prompts = case["settings"], case["prompts"]
    completions, noise = torch.tensor(case["completions"]), torch.tensor(case["noise"])
    model = {}
    for name in ("policy", "behaviour", "ref", "reward", "value"):
        kind = AutoModelForSequenceClassification if name in ("reward", "value") else AutoModelForCausalLM
        model[name] = kind.from_pretrained(f"{directory}/{name}", dtype=torch.float32).eval()
    words = tokenizer(model["policy"].config.vocab_size)

    def index(queries):
        plain = [[t for t in q if t != words.pad_token_id] for q in queries.tolist()]
        return torch.tensor([prompts.index(p) for p in plain])

    def batch_generation(policy, queries, *args):
        rows = index(queries)
        whole = torch.cat((queries, completions[rows]), 1)
        logits = ppo_trainer.forward(model["behaviour"], whole, words.pad_token_id).logits
        logits = logits[:, queries.shape[1] - 1 : -1] / (c["temperature"] + 1e-7)
        seen["order"] = rows
        return whole, logits

    plain_reward = ppo_trainer.get_reward

    def get_reward(scorer, rows, pad, context):
        full, last, ends = plain_reward(scorer, rows, pad, context)
        if scorer is model["value"]:
            full = full.clone()
            full[:, context - 1 : -1, 0] += noise[seen["order"]]
        return full, last, ends

    seen = {}
    ppo_trainer.batch_generation, ppo_trainer.get_reward = batch_generation, get_reward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            total_episodes=len(prompts),
            num_ppo_epochs=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=len(prompts),
            num_sample_generations=0,
            response_length=completions.shape[1],
            stop_token="eos",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            **c,
        ),
        processing_class=words,
        model=model["policy"],
        ref_model=model["ref"],
        reward_model=model["reward"],
        value_model=model["value"],
        train_dataset=Dataset.from_list([{"input_ids": p} for p in prompts]),
    )

    def backward(loss):
        frame = sys._getframe(1).f_locals
        loss.backward()
        difference = frame["logprobs_diff"]
        seen["locals"] = {k: frame[k].detach().clone() for k in KEPT}
        seen["locals"]["minibatch"] = torch.tensor(frame["micro_batch_inds"])
        # the trainer works these out after the step, by these very lines
        losses, losses2 = frame["pg_losses"], frame["pg_losses2"]
        seen["locals"]["pg_clipfrac"] = ppo_trainer.masked_mean(
            (losses2 > losses).float(), ~frame["padding_mask"][frame["micro_batch_inds"]]
        )
        seen["locals"]["approxkl"] = 0.5 * (difference**2).mean().detach()
        raise Done

    trainer.accelerator.backward = backward
    with contextlib.suppress(Done):
        trainer.train()
    found = {k: v.numpy() for k, v in seen["locals"].items()}
    permuted = found.pop("minibatch")  # a minibatch's rows are in an order of their own
    for name in ("new_logprobs", "vpred"):
        found[name] = found[name][np.argsort(permuted)]
    back = np.argsort(seen["order"].numpy())
    found = {k: v[back] if v.ndim else v for k, v in found.items()}
    for role in ("policy", "value"):
        for name, parameter in model[role].named_parameters():
            if parameter.grad is not None:
                found[f"gradient/{role}/{name}"] = parameter.grad.numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
