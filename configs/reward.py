"""A reward model from Llama-3.1-8B on the helpful half of Anthropic's HH, from the model that configs/sft.py makes.

paper     Training a Helpful and Harmless Assistant, arXiv 2204.05862; the Bradley-Terry loss of arXiv 2203.02155, eq. 1
command   bash launch/gpu_node.sh --config=configs/reward.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/reward.py:tpu \
               --config.workdir=gs://BUCKET/llama3_8b/reward --config.model.path=DIR_OF_THE_SFT_MODEL
your own  --config.model.path=DIR_OR_HUB_ID --config.data.sources=pairs.jsonl
hardware  gpu: one node of 8 H100-80GB;  tpu: v5p-16, 8 chips of 95 GiB on 2 hosts
memory    MEMORY
time      about 5 min and as much to load and compile (an estimate: 44 k pairs of about 250 tokens, 6 N FLOPs at 30 % MFU
          on 8 H100; twice that on v5p-16)
numbers   literature: 72.6 % of the held-out helpful pairs ranked rightly by a reward model of 0.8 B
          (hub: Ray2333/gpt2-large-helpful-reward_model); annotators disagree, so far more than 75 % would be a sign of a
          leak; of this config: not yet measured
"""

from jaxalign.config import defaults


def get_config(hardware: str = "gpu"):
    """The stage on "gpu" or "tpu"."""
    config = defaults("reward")
    config.workdir = "runs/llama3_8b/reward"
    config.model.path = "runs/llama3_8b/sft/export"
    config.model.dtype = "bfloat16"  # of the computation; weights and Adam stay float32
    config.data.sources = ({"path": "Anthropic/hh-rlhf", "name": "helpful-base"},)
    config.data.eval_fraction = 0.05
    config.data.max_length = 1024
    config.data.truncation = "keep_end"
    config.data.packing = True
    config.data.row_length = 2048  # about eight pairs
    config.batch_size = 16  # packed rows: about 130 pairs
    config.grad_accum_steps = {"gpu": 1, "tpu": 1}[hardware]
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 20
    config.eval.every = 100
    config.checkpoint.every = 100
    return config
