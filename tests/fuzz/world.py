"""The good inputs that cases break: a tiny model, a reward model, data, a reward, and configs that run in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.fuzz.case import Place

ALGORITHMS = ("sft", "reward", "dpo", "ppo")
DATA = {"sft": "demonstrations", "reward": "preferences", "dpo": "preferences", "ppo": "prompts"}
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
REWARD = "def reward(prompts, completions):\n    return [float(len(c)) for c in completions]\n"


def build(world: Path) -> Path:
    """Writes the world where it is not yet: `model`, `model-rm`, the files of `jaxalign.examples.assets`, `r.py`."""
    if (world / "ready").exists():
        return world
    from jaxalign.examples import assets

    shutil.rmtree(world, ignore_errors=True)
    counts, shape = dict(assets.COUNTS), dict(assets._LLAMA)
    assets.COUNTS.update(demonstrations=48, preferences=48, prompts=24, heldout=8)
    assets._LLAMA.update(_SHAPE)
    try:
        assets.write_assets(world)
    finally:
        assets.COUNTS.update(counts)
        assets._LLAMA.update(shape)
    for head, name in ((None, "model"), ("score", "model-rm")):
        _weights(world / "model", world / name, head)
    (world / "r.py").write_text(REWARD)
    (world / "ready").write_text("")
    return world


def _weights(base: Path, directory: Path, head: str | None) -> None:
    """Random weights for the config; a model with a scalar head is written beside it."""
    from tests.models import tiny_models

    hf = json.loads((base / "config.json").read_text())
    if head:
        hf |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
        directory.mkdir()
        for file in base.glob("*token*"):
            shutil.copy(file, directory)
    tiny_models.write(directory, hf, tiny_models.tensors(hf, head, seed=1 if head else 0))


def config_text(world: Path, algorithm: str, *lines: str) -> str:
    """A config file of a run of two small steps; `lines` come last and speak of `c`."""
    text = f"""\
from jaxalign.config import defaults


def get_config():
    c = defaults("{algorithm}")
    c.workdir = "out"
    c.model.path = "{world}/model"
    c.model.remat = "none"
    c.data.sources = ("{world}/{DATA[algorithm]}.jsonl",)
    c.data.max_length = 64
    c.batch_size = 4
    c.num_train_steps = 2
    c.logging.trackers = ()
    c.logging.progress = False
"""
    if algorithm == "ppo":
        text += f'    c.rewards.function = "{world}/r.py:reward"\n    c.rollout.max_new_tokens = 4\n'
        text += "    c.algorithm.num_ppo_epochs = 1\n"
    else:  # one shape for all data: what is compiled for one case serves the next
        text += f"    c.data.row_length = {64 if algorithm == 'sft' else 128}\n"
    if algorithm in ("dpo", "ppo"):
        text += "    c.logging.samples_every = 0\n"
    return text + "".join(f"    {line}\n" for line in lines) + "    return c\n"


def train(place: Place, algorithm: str, *lines: str, flags: tuple[str, ...] = (), dry: bool = False) -> list[str]:
    """The arguments that train by a config file with `lines` added, or only look."""
    (place.here / "config.py").write_text(config_text(place.world, algorithm, *lines))
    return ["train", "--config=config.py", *flags] + ["--dry_run"] * dry


def not_finite(here: Path) -> str:
    """What is not finite in the results below a directory; "" where all is well."""
    import numpy as np
    from safetensors.numpy import load_file

    for file in here.glob("**/export*/*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.dtype.kind == "f" and not np.all(np.isfinite(tensor)):
                return f"not finite: {name} in {file.relative_to(here)}"
    for file in here.glob("out*/**/metrics.jsonl"):
        for line in file.read_text(errors="replace").splitlines():
            row = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if "loss" in row and row["loss"] is None:
                return f"not finite: the loss of step {row.get('step')} in {file.relative_to(here)}"
    return ""
