r"""PPO of Llama-3.1-8B against the reward model that configs/reward.py makes, from the model of configs/sft.py.

paper     Training language models to follow instructions, arXiv 2203.02155; PPO, arXiv 1707.06347; details of
          implementation, arXiv 2403.17031
command   bash launch/gpu_node.sh --config=configs/ppo.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/ppo.py \
               --config.workdir=gs://BUCKET/llama3_8b/ppo --config.model.path=DIR_OF_THE_SFT_MODEL \
               --config.rewards.model=DIR_OF_THE_REWARD_MODEL
first     bash launch/gpu_node.sh --config=configs/sft.py     # these write the exports that this one starts from
          bash launch/gpu_node.sh --config=configs/reward.py
your own  --config.model.path=DIR_OR_HUB_ID --config.data.sources=prompts.jsonl, and --config.rewards.model=DIR, or
          --config.rewards.model=None --config.rewards.function=FILE.py:NAME
hardware  one node of 8 H100-80GB, or a TPU slice v5p-16: 8 chips of 95 GiB on 2 hosts
memory    each device holds 25.3 GiB (float32 weights 7.2 and Adam 14.5 of policy and value, bfloat16 reference and
          reward model 3.6); a step takes 47 GiB on an H100 and 58 on a v5p chip, the frozen 3.6 included
          (compiled for both by `jaxalign plan`, not run there)
time      about half an hour on 8 H100: 300 iterations of 5.8 s, of which four updates take 0.87 s each (MFU 63 %),
          as `jaxalign plan` predicts where products reach 75 % of the peak
numbers   not yet measured
see       objective/scores up and objective/kl slowly with it; should the scores rise while completions grow alike
          (rollout/distinct_2) or a judge disagrees, the reward is being hacked: a larger kl_coef, or stop earlier
"""

from jaxalign.config import defaults


def get_config():
    """The stage, for 8 devices of 80 GB or more."""
    config = defaults("ppo")
    config.workdir = "runs/llama3_8b/ppo"
    config.model.path = "runs/llama3_8b/sft/export"
    config.rewards.model = "runs/llama3_8b/reward/export"  # the value model starts from it too
    config.model.dtype = "bfloat16"  # of the computation; the trained weights and Adam stay float32
    config.model.remat = "auto"  # as little as fits
    config.model.frozen_dtype = "bfloat16"  # reference and reward model are only read
    config.data.sources = ({"path": "Anthropic/hh-rlhf", "name": "helpful-base"},)  # its prompts
    config.data.eval_fraction = 0.01
    config.data.max_length = 768
    config.data.truncation = "keep_end"
    config.rollout.max_new_tokens = 256
    config.rollout.tensor = 4  # each sampled token reads all weights: they are split over neighbours then
    config.rewards.missing_eos_penalty = 1.0
    config.batch_size = 128  # prompts of an iteration
    config.num_train_steps = 300
    config.algorithm.num_ppo_epochs = 2
    config.algorithm.num_minibatches = 2
    config.algorithm.kl_coef = 0.05
    config.optimizer.learning_rate = 1e-6
    config.optimizer.value_learning_rate = 5e-6
    config.optimizer.warmup_steps = 20
    config.eval.every = 50
    config.eval.num_batches = 2
    config.checkpoint.every = 50
    config.logging.samples_every = 10
    return config
