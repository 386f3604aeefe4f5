r"""A reward model from Llama-3.1-8B on the helpful half of Anthropic's HH, from the model that configs/sft.py makes.

paper     Training a Helpful and Harmless Assistant, arXiv 2204.05862; the Bradley-Terry loss of arXiv 2203.02155, eq. 1
command   bash launch/gpu_node.sh --config=configs/reward.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/reward.py \
               --config.workdir=gs://BUCKET/llama3_8b/reward --config.model.path=DIR_OF_THE_SFT_MODEL
first     bash launch/gpu_node.sh --config=configs/sft.py     # writes runs/llama3_8b/sft/export; or --config.model.path
your own  --config.model.path=DIR_OR_HUB_ID --config.data.sources=pairs.jsonl
hardware  one node of 8 H100-80GB, or a TPU slice v5p-16: 8 chips of 95 GiB on 2 hosts
memory    each device holds 10.5 GiB (float32 weights 3.5, Adam 7.0); a step takes 41 GiB on an H100 and 36 on a
          v5p chip (compiled for both by `jaxalign plan`, not run there)
time      about 2 min on 8 H100 (0.30 s a step, MFU 59 %), and as much to load and compile: 44 k pairs of about 250
          tokens, the prompt once, as measured on the test split; as `jaxalign plan` predicts where products reach
          75 % of the peak
numbers   literature: 72.6 % of the held-out helpful pairs ranked correctly by a reward model of 0.8 B
          (hub: Ray2333/gpt2-large-helpful-reward_model); annotators disagree, so far more than 75 % would
          smell of a leak; of this config: not yet measured. The official test split:
          --config.data.eval_sources='{"path": "Anthropic/hh-rlhf", "name": "helpful-base", "split": "test"}'
"""

from jaxalign.config import defaults


def get_config():
    """The stage, for 8 devices of 80 GB or more."""
    config = defaults("reward")
    config.workdir = "runs/llama3_8b/reward"
    config.model.path = "runs/llama3_8b/sft/export"
    config.model.dtype = "bfloat16"  # of the computation; weights and Adam stay float32
    config.model.remat = "none"  # little is kept: rows are short
    config.data.sources = ({"path": "Anthropic/hh-rlhf", "name": "helpful-base"},)
    config.data.eval_fraction = 0.05
    config.data.max_length = 1024
    config.data.truncation = "keep_end"
    config.data.packing = True
    config.data.row_length = 2048  # about eight pairs
    config.batch_size = 16  # packed rows: about 130 pairs
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 20
    config.eval.every = 100
    config.checkpoint.every = 100
    return config
