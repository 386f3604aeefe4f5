"""PPO at toy size, from the models that configs/toy/sft.py and configs/toy/reward.py make.

first     .venv/bin/python -c 'from jaxalign.examples.assets import write_assets; write_assets("runs/toy/world")'
          bash launch/gpu_node.sh --config=configs/toy/sft.py
          bash launch/gpu_node.sh --config=configs/toy/reward.py
command   bash launch/gpu_node.sh --config=configs/toy/ppo.py      (also without a GPU)
hardware  1 CPU core
memory    0.9 GB
time      20 s
numbers   objective/kl from 0 to a few nats a completion, the score up by 1 or so; the reward model memorised 32
          pairs, so the gold reward need not follow
"""

from jaxalign.config import defaults


def get_config():
    """The stage."""
    config = defaults("ppo")
    config.workdir = "runs/toy/ppo"
    config.model.path = "runs/toy/sft/export"
    config.rewards.model = "runs/toy/reward/export"
    config.model.remat = "none"
    config.data.sources = ("runs/toy/world/prompts.jsonl",)
    config.data.max_records = 32
    config.data.max_length = 64
    config.num_train_steps = 6
    config.batch_size = 16
    config.rollout.max_new_tokens = 24
    config.algorithm.num_ppo_epochs = 2
    config.algorithm.num_minibatches = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.value_learning_rate = 2e-3
    config.logging.samples_every = 5
    return config
