"""Runs that faults come upon: of the four algorithms and of two stages, whole and killed on the way, made once."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from tests.fuzz.case import Place
from tests.fuzz.child import Child
from tests.fuzz.inside import call
from tests.fuzz.world import DATA, config_text

RUNS = ("sft", "reward", "dpo", "ppo", "stages")
STEPS, KILLED = 8, 5
ARGUMENTS = ["train", "--config=config.py"]
_CLOCK = ("time", "tokens_per_second", "mfu")


def lay_out(here: Path, world: Path, run: str) -> None:
    """Writes a run's inputs, each of them the run's own: `model`, `model-rm`, `data.jsonl`, `r.py`, `config.py`."""
    for name in ("model", "model-rm"):
        shutil.copytree(world / name, here / name)
    shutil.copy(world / "r.py", here)
    algorithm = "dpo" if run == "stages" else run
    shutil.copy(world / f"{DATA[algorithm]}.jsonl", here / "data.jsonl")
    more = [
        "c.model.path = 'model'",
        "c.data.sources = ('data.jsonl',)",
        f"c.num_train_steps = {STEPS}",
        "c.checkpoint.every, c.checkpoint.keep = 2, 2",
        "c.optimizer.learning_rate = 1e-3",
    ]
    if run == "ppo":
        more += ["c.rewards.function = 'r.py:reward'", "c.rewards.normalize, c.algorithm.kl_target = True, 0.1"]
        more += ["c.algorithm.num_minibatches = 2"]
    if run == "dpo":
        more += ["c.algorithm.reference = 'cached'"]
    if run == "reward":
        more += ["c.data.eval_fraction = 0.25", "c.eval.every = 4"]
    text = config_text(world, algorithm, *more)
    if run == "stages":
        shutil.copy(world / f"{DATA['sft']}.jsonl", here / "texts.jsonl")
        first = [*more, "c.data.sources = ('texts.jsonl',)", "c.num_train_steps = 2"]
        then = [*more, "c.model.path = None", "c['from'].model = 'sft'"]
        one, two = config_text(world, "sft", *first), config_text(world, "dpo", *then)
        text = f"{one.replace('get_config', 'sft')}\n\n{two.replace('get_config', 'dpo')}\n\n"
        text += "def get_config():\n    from jaxalign.config import stages\n\n"
        text += "    return stages('out', sft=sft(), dpo=dpo())\n"
    (here / "config.py").write_text(text)


def directory(here: Path, run: str) -> Path:
    """Where the run that is killed works."""
    return here / "out" / "dpo" if run == "stages" else here / "out"


def made(place: Place, run: str, state: str) -> Path:
    """A folder of a run's inputs and of what it left: `whole`, or `killed` by signal 9 at some step.

    Raises:
      RuntimeError: the good run fails.
    """
    folder = place.world / "runs" / run / state
    if not folder.exists():
        import os

        before = Path.cwd()
        here = place.here  # runs are always made in the same place: paths in their files stay true
        lay_out(here, place.world, run)
        if state == "whole":
            os.chdir(here)
            status, text = call(ARGUMENTS)
            if status != 0:
                raise RuntimeError(f"the whole run of {run} fails:\n{text}")
        else:
            child = Child(ARGUMENTS, here=here, pace=0.5)
            child.until(KILLED, directory(here, run) / "metrics.jsonl")
            child.until_true((directory(here, run) / "checkpoints" / str(KILLED - 1)).exists)
            child.send(signal.SIGKILL)
            outcome = child.end()
            if outcome.status != -signal.SIGKILL:
                raise RuntimeError(f"the run of {run} was not killed:\n{outcome.text}")
        os.chdir(before)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(here, folder, symlinks=True)
        for item in here.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        os.chdir(before)
    return folder


def put(place: Place, run: str, state: str) -> Path:
    """Copies such a folder to where the case works; gives the run's directory in it."""
    made(place, run, "whole")
    shutil.copytree(made(place, run, state), place.here, symlinks=True, dirs_exist_ok=True)
    return directory(place.here, run)


def rows(run_directory: Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in _CLOCK and not k.startswith("time/")} for r in found]


def differs(place: Place, run: str, *, metrics: bool = True) -> str:
    """How a run that is done differs from the uninterrupted one; "" where it is the same to the bit."""
    mine, whole = directory(place.here, run), directory(made(place, run, "whole"), run)
    if not (mine / "DONE").exists():
        return "the run is not done"
    one, other = ((d / "export" / "model.safetensors").read_bytes() for d in (mine, whole))
    if one != other:
        return "other weights than the uninterrupted run's"
    if metrics and rows(mine) != rows(whole):
        return "other figures than the uninterrupted run's"
    return ""
