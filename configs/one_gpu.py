r"""Llama-3.1-8B or Qwen3-8B on one GPU: SFT, then DPO; or a reward model, then PPO, four adapters of one base.

paper     LoRA, arXiv 2106.09685; QLoRA, 2305.14314; DPO, 2305.18290; PPO, 1707.06347
command   jaxalign train --config=configs/one_gpu.py:24gb --config.stages=sft,dpo     # or sft,reward,ppo; or all four
          jaxalign train --config=configs/one_gpu.py:80gb --config.stages=sft,dpo
first     HF_TOKEN of an account that has accepted the licence of Llama 3.1; the same command with --dry_run
your own  --config.sft.model.path=Qwen/Qwen3-8B --config.sft.model.tokenizer=None
          --config.sft.data.sources=chats.jsonl --config.dpo.data.sources=pairs.jsonl
hardware  24gb: one RTX 4090, the base in four bits (NF4); 80gb: one A100-80GB, the base in bfloat16
memory    of 22.1 and 73.6 GiB that programs may use, the base once: SFT 14.8 and 53.7, reward model 13.5 and 51.6,
          DPO 15.1 and 54.0, PPO 17.5 and 41.5; of Qwen3-8B SFT 15.7 and 56.8, reward model 14.2 and 54.1,
          DPO 19.1 and 57.2, PPO 18.8 and 43.4 (compiled for both by `jaxalign plan`, not run there)
time      a step of SFT 12.9 s of 32,768 tokens and 10.9 s of 65,536, of DPO 18.0 s and 16.2 s, an iteration of PPO
          62 s (32 prompts) and 49 s (64), as `jaxalign plan` predicts where products reach 80 % of the peak; of
          Qwen3-8B 4 to 13 % more
numbers   not yet measured
see       rewards/accuracies of DPO and objective/scores and objective/kl of PPO, as for configs/dpo.py and ppo.py
"""

from jaxalign.config import defaults, stages
from jaxalign.errors import InputError

BASE, CHAT = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"  # the same tokens, and a chat template


def get_config(memory: str = "24gb"):
    """Four stages, for a card of 24 GB, or one of 80."""
    if memory not in ("24gb", "80gb"):
        raise InputError(f"configs/one_gpu.py:{memory}", "a card of 24gb or 80gb", "--config=configs/one_gpu.py:24gb")
    small = memory == "24gb"
    return stages("runs/one_gpu", sft=sft(small), reward=reward(small), dpo=dpo(small), ppo=ppo(small))


def _shared(algorithm: str, small: bool):
    """What all stages have: an adapter beside a base that is only read."""
    config = defaults(algorithm, adapter=16)
    config.model.dtype = "bfloat16"  # of the computation; adapters and Adam stay float32
    config.model.frozen_dtype = "nf4" if small else "bfloat16"
    config.model.remat = "attention" if small else "dots"
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    config.data.row_length = 2048
    config.data.packing = True
    config.data.truncation = "keep_end"
    config.batch_size = 16 if small else 32  # packed rows, in parts of two or four
    config.grad_accum_steps = 8
    config.eval.every = 100
    config.eval.num_batches = 8
    config.checkpoint.every = 100
    return config


def sft(small: bool):
    """Dialogues; every answer is learned."""
    config = _shared("sft", small)
    config.model.path = BASE
    config.model.tokenizer = CHAT
    config.data.sources = ({"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"},)
    config.data.truncation = "keep_start"  # a long dialogue loses its last turns
    return config


def reward(small: bool):
    """A score for each answer."""
    config = _shared("reward", small)
    config["from"].model = "sft"
    config.data.sources = ("argilla/ultrafeedback-binarized-preferences-cleaned",)
    return config


def dpo(small: bool):
    """Pairs; the reference is the base and a frozen copy of SFT's adapter."""
    config = _shared("dpo", small)
    config["from"].model = "sft"
    config.data.sources = ("argilla/ultrafeedback-binarized-preferences-cleaned",)
    return config


def ppo(small: bool):
    """Prompts; policy, reference, value and reward model are adapters of one base."""
    config = _shared("ppo", small)
    config["from"].model = "sft"
    config["from"].reward = "reward"
    config.algorithm.one_base = True
    config.data.sources = ({"path": "Anthropic/hh-rlhf", "name": "helpful-base"},)  # its prompts
    config.data.packing = False
    config.data.max_length = 768
    config.data.row_length = None
    config.rollout.max_new_tokens = 256
    config.rewards.missing_eos_penalty = 1.0
    config.batch_size = 32 if small else 64
    config.num_train_steps = 300
    config.algorithm.num_ppo_epochs = 2
    config.algorithm.num_minibatches = 2
    config.grad_accum_steps = 4 if small else 8
    config.algorithm.kl_coef = 0.05
    config.eval.num_batches = 2
    config.logging.samples_every = 10
    return config
