"""The quickstart: SFT, then DPO, and reward model -> PPO from the same SFT model, on a world made from a seed.

command   bash launch/quickstart.sh
hardware  2 CPU cores
data      made on the spot by jaxalign/pipeline/world.py
"""

from jaxalign.config import defaults, stages

WORLD = "runs/quickstart/world"


def get_config():
    """Four stages over one small Llama that is trained from scratch."""
    return stages("runs/quickstart", sft=sft(), reward=reward(), dpo=dpo(), ppo=ppo())


def _small(config, train: str, heldout: str):
    """What all four stages share."""
    config.data.sources = (f"{WORLD}/{train}.jsonl",)
    config.data.eval_sources = (f"{WORLD}/{heldout}.jsonl",)
    config.data.max_length = 64
    config.model.remat = "none"
    config.batch_size = 64
    config.optimizer.warmup_steps = 20
    config.logging.every = 10
    return config


def sft():
    config = _small(defaults("sft"), "demonstrations", "demonstrations_heldout")
    config.model.path = f"{WORLD}/model"
    config.model.from_scratch = True
    config.data.packing = False
    config.num_train_steps = 300
    config.optimizer.learning_rate = 5e-3
    return config


def reward():
    config = _small(defaults("reward"), "preferences", "preferences_heldout")
    config["from"].model = "sft"
    config.num_epochs = 3
    config.optimizer.learning_rate = 2e-3
    return config


def dpo():
    config = _small(defaults("dpo"), "preferences", "preferences_heldout")
    config["from"].model = "sft"
    config.optimizer.learning_rate = 5e-4  # far above the guides' range: the model is tiny
    config.rollout.max_new_tokens = 28
    return config


def ppo():
    config = _small(defaults("ppo"), "prompts", "prompts_heldout")
    config["from"].model = "sft"
    config["from"].reward = "reward"
    config.num_train_steps = 40
    config.optimizer.learning_rate = 3e-4
    config.optimizer.value_learning_rate = 1e-3
    config.rollout.max_new_tokens = 28
    config.algorithm.num_minibatches = 2
    return config
