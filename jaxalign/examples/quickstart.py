"""The quickstart: makes synthetic data, runs SFT, reward, DPO and PPO, and compares DPO with PPO."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.config import to_dict
from jaxalign.examples.assets import write_assets
from jaxalign.examples.findings import FIGURES
from jaxalign.pipeline import stages
from jaxalign.pipeline.configfile import load_config, run_script
from jaxalign.rollout.sampling import Sampling

CONFIG = "configs/quickstart.py"
WIDTH = 150  # of its tables, in characters, where the terminal has them
ROADS = ("dpo", "ppo")
_MODELS = {  # models in memory while a stage trains
    "sft": ("policy",),
    "reward": ("reward",),
    "dpo": ("policy", "reference"),
    "ppo": ("policy", "value", "reward", "reference"),
}


def run(config: Any) -> dict[str, Any]:
    """Runs the quickstart, or resumes it.

    Args:
      config: the tree of `configs/quickstart.py`.

    Returns:
      The summary: for `sft`, `reward`, `dpo` and `ppo` their figures; also written to `workdir/summary.json`.
    """
    started = time.monotonic()
    world = write_assets(Path(config.sft.model.path).parent, config.seed)
    stages.run(config)
    workdir = Path(config.workdir)
    done = {name: json.loads((workdir / name / "DONE").read_text()) for name in config.stages}
    compared = {road: _compare(config, road, world) for road in ROADS}
    summary: dict[str, Any] = {name: _cost(name, done[name]) for name in config.stages}
    summary["reward"]["accuracy"] = done["reward"]["eval"]["eval/rewards/accuracies"]
    summary["dpo"]["accuracy"] = done["dpo"]["eval"]["eval/rewards/accuracies"]
    summary["sft"] |= _quality(compared["dpo"]["models"]["base"])
    for road, result in compared.items():
        rate = result["win_rate"]
        summary[road] |= _quality(result["models"]["aligned"])
        summary[road] |= {"win_rate": rate["rate"], "win_rate_low": rate["low"], "win_rate_high": rate["high"]}
    summary["samples"] = [
        {"prompt": d["prompt"], "sft": d["base"], "dpo": d["aligned"], "ppo": p["aligned"]}
        | {"gold": {"sft": d["base_reward"], "dpo": d["aligned_reward"], "ppo": p["aligned_reward"]}}
        for d, p in zip(compared["dpo"]["samples"][:8], compared["ppo"]["samples"][:8], strict=True)
    ]
    summary["wall_seconds"] = time.monotonic() - started
    summary["config"] = to_dict(config)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _with_its_world(config: Any) -> Any:
    """The config with its data under `workdir/world`, so that runs in different directories share no files."""
    usual, own = "runs/quickstart/world/", f"{config.workdir}/world/"

    def moved(path: Any) -> Any:
        return own + path.removeprefix(usual) if isinstance(path, str) and path.startswith(usual) else path

    with config.unlocked():
        config.sft.model.path = moved(config.sft.model.path)
        for name in config.stages:
            data = config[name].data
            data.sources, data.eval_sources = (tuple(map(moved, paths)) for paths in (data.sources, data.eval_sources))
    return config


def _compare(config: Any, road: str, world: Path) -> dict[str, Any]:
    """A road's model against the SFT model under the gold preference, on prompts that no stage has seen."""
    from jaxalign.pipeline.compare import compare

    return compare(
        str(Path(config.workdir, "sft", "export")),
        str(Path(config.workdir, road, "export")),
        str(world / "prompts_heldout.jsonl"),
        Sampling.of(config[road].rollout),
        reward="jaxalign.examples.world:gold",
        num_prompts=None,
        confidence=0.95,
        seed=config.seed,
    )


def _cost(name: str, done: dict[str, Any]) -> dict[str, Any]:
    return {
        "models": _MODELS[name],
        "model_bytes": sum(done["model_bytes"].values()),
        "optimizer_bytes": done["optimizer_bytes"],
        "peak_memory_bytes": done["peak_memory_bytes"],
        "wall_seconds": done["wall_seconds"],
        "loss": next(v for k, v in done["metrics"].items() if k in ("loss", "loss/policy")),
    }


def _quality(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "gold_reward": figures["reward"],
        "kl": figures["kl_to_base"],
        "finished": figures["finished"],
        "distinct_2": figures["distinct_2"],
        "mean_length": figures["mean_length"],
    }


def page(summary: dict[str, Any], width: int = WIDTH) -> str:
    """The summary as text: a table and samples side by side."""
    import io

    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, markup=False)
    figures = Table("", *_MODELS)
    for title, show in FIGURES:
        figures.add_row(title, *(show(summary[name]) for name in _MODELS))
    samples = Table("prompt", "sft", *ROADS, show_lines=True, expand=True)
    for sample in summary["samples"][:4]:
        cells = (f"{sample[name].strip()}\n[gold {sample['gold'][name]:.2f}]" for name in ("sft", *ROADS))
        samples.add_row(sample["prompt"], *cells)
    console.print(samples)
    console.print(figures)
    return out.getvalue()


def main(argv: Sequence[str]) -> int:
    """`python -m jaxalign.examples.quickstart [--config.field=value ...]`; the fields are those of its config."""
    return run_script("quickstart", argv, _run_and_show, CONFIG)


def _run_and_show(overrides: Sequence[tuple[str, str | None]]) -> None:
    from jaxalign.examples.curves import draw, need_matplotlib

    need_matplotlib()  # before minutes of training, not after them
    config = _with_its_world(load_config(CONFIG, overrides))
    print(f"{CONFIG} leaves the guides' ranges where warnings say so, and gives its reasons: its model is tiny")
    summary = run(config)
    picture = draw(Path(config.workdir))
    print(page(summary, min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)))
    print(f"summary   {Path(config.workdir, 'summary.json')}\ncurves    {picture}")
    print(f"the aligned models are in {config.workdir}/dpo/export and {config.workdir}/ppo/export; ask one with")
    asked = f'--prompt "{summary["samples"][0]["prompt"]}"'
    command = os.path.relpath(Path(sys.executable).with_name("jaxalign"))
    print(f"  {command} generate --model {config.workdir}/dpo/export {asked}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
