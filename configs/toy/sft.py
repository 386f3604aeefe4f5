"""SFT at toy size: a Llama of 0.2 M parameters from scratch on 256 sentences, for tests and to see a whole run at once.

first     .venv/bin/python -c 'from jaxalign.examples.assets import write_assets; write_assets("runs/toy/world")'
command   bash launch/gpu_node.sh --config=configs/toy/sft.py      (also without a GPU: it takes what JAX finds)
hardware  1 CPU core
memory    0.7 GB, nearly all of it Python and the compiler
time      15 s, nearly all of it start-up and compilation
numbers   loss from 6.2 nats a token (ln 512, the vocabulary) to 0.8
"""

from jaxalign.config import defaults


def get_config():
    """The stage."""
    config = defaults("sft")
    config.workdir = "runs/toy/sft"
    config.model.path = "runs/toy/world/model"
    config.model.from_scratch = True
    config.model.remat = "none"
    config.data.sources = ("runs/toy/world/demonstrations.jsonl",)
    config.data.max_records = 256
    config.data.max_length = 64
    config.data.packing = False
    config.num_train_steps = 40
    config.batch_size = 16
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 4
    return config
