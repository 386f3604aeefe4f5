"""DPO at toy size: it memorises 32 pairs, from the model that configs/toy/sft.py makes.

first     .venv/bin/python -c 'from jaxalign.examples.assets import write_assets; write_assets("runs/toy/world")'
          bash launch/gpu_node.sh --config=configs/toy/sft.py
command   bash launch/gpu_node.sh --config=configs/toy/dpo.py      (also without a GPU)
hardware  1 CPU core
memory    0.7 GB
time      15 s
numbers   loss from 0.69 (ln 2) to 0.4; nothing is learnt about other pairs
"""

from jaxalign.config import defaults


def get_config():
    """The stage."""
    config = defaults("dpo")
    config.workdir = "runs/toy/dpo"
    config.model.path = "runs/toy/sft/export"
    config.model.remat = "none"
    config.data.sources = ("runs/toy/world/preferences.jsonl",)
    config.data.max_records = 32
    config.data.max_length = 64
    config.num_train_steps = 30
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3  # a thousand times what a real model is given
    config.optimizer.warmup_steps = 4
    config.rollout.max_new_tokens = 24
    config.logging.samples_every = 15
    return config
