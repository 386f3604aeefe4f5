"""Figures of a quickstart run, saved by it and shown in the notebook."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import InputError
from jaxalign.evaluate.winrate import GOOD, HARM
from jaxalign.examples.world import gold_reward

STAGES = ("sft", "reward", "dpo", "ppo")
ROADS = {"DPO": ("sft", "dpo"), "RLHF": ("sft", "reward", "ppo")}  # the stages of each
_COLOURS = {"sft": "#7f7f7f", "reward": "#9467bd", "dpo": "#1f77b4", "ppo": "#d62728"}
_ROLES = {"policy": "#2f6f4f", "value": "#6fae8b", "ref": "#9db4c0", "reward": "#c9b1d9", "optimizer": "#f2c57c"}
_COMMAND = "bash launch/quickstart.sh"
_MIB = 2**20


class Results(NamedTuple):
    """A finished quickstart run."""

    workdir: Path
    summary: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]  # of each stage, a dict for each logged step
    done: dict[str, dict[str, Any]]  # of each stage, its DONE file


def find() -> Path:
    """The quickstart's directory: `$QUICKSTART_DIR`, or `runs/quickstart` here or in a folder above.

    Raises:
      InputError: there is none, with the command that makes it.
    """
    if chosen := os.environ.get("QUICKSTART_DIR"):
        return Path(chosen)
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "runs/quickstart/summary.json").is_file():
            return folder / "runs/quickstart"
    raise InputError(f"no runs/quickstart/summary.json from {Path.cwd()} upwards", "a finished quickstart", _COMMAND)


def results(workdir: Path) -> Results:
    """Reads a quickstart's directory.

    Raises:
      InputError: the quickstart has not been there, or not to its end.
    """
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        metrics = {name: read(workdir, name) for name in STAGES}
        done = {name: json.loads((workdir / name / "DONE").read_text()) for name in STAGES}
    except FileNotFoundError as error:
        fix = f"{_COMMAND} --config.workdir={workdir}"
        raise InputError(f"no {error.filename}", "a finished quickstart", fix) from None
    return Results(workdir, summary, metrics, done)


def read(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's metrics, a dict for each logged step."""
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def gold_over_training(workdir: Path, stage: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean gold reward of the completions that the stage logged there."""
    files = sorted((workdir / stage / "samples").glob("*.jsonl"), key=lambda file: int(file.stem))
    means = []
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        means.append(sum(gold_reward(row["prompt"], row["completion"]) for row in rows) / len(rows))
    return [int(file.stem) for file in files], means


# ---- figures -------------------------------------------------------------------------------------------------------


def need_matplotlib() -> Any:
    """The class of figures that live outside of pyplot's global state: no display, and a notebook shows them once.

    Raises:
      InputError: matplotlib, which training does without, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"pictures need matplotlib: {error}",
            "the extra plots, which training does without",
            "pip install 'jaxalign[plots]'   (from a clone: bash launch/setup.sh plots)",
        ) from error
    return Figure


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    figure = need_matplotlib()(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw(workdir: Path) -> Path:
    """Draws the stages' curves and the two roads beside each other, to `workdir/curves.png`."""
    found = results(workdir)
    figure, axes = _figure(17, 11, 3, 4)
    for panel, axis in zip(_TRAINING, axes, strict=False):
        _lines(axis, found, *panel)
    for show, axis in zip((_win_rate, _frontier, _held, _needed, _time), axes[len(_TRAINING) :], strict=True):
        show(axis, found)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def training(found: Results) -> Any:
    """Training curves of each stage."""
    figure, axes = _figure(14, 6.5, 2, 4)
    for panel, axis in zip(_TRAINING, axes, strict=False):
        _lines(axis, found, *panel)
    axes[-1].set_axis_off()
    return figure


def memory(found: Results) -> Any:
    """Memory of each stage: its state between steps, and its peak."""
    figure, axes = _figure(13, 4.2, 1, 2)
    _held(axes[0], found)
    _needed(axes[1], found)
    return figure


def reward_and_kl(found: Results) -> Any:
    """Gold reward against the distance from the start, and the reward model beside the gold over PPO's training."""
    figure, axes = _figure(13, 4.4, 1, 2)
    _frontier(axes[0], found)
    _proxy_and_gold(axes[1], found)
    return figure


def win_rates(found: Results) -> Any:
    """Both roads against the SFT model."""
    figure, axes = _figure(8, 2.4, 1, 1)
    _win_rate(axes[0], found)
    return figure


def seconds(found: Results) -> Any:
    """Wall time of the roads, stage by stage."""
    figure, axes = _figure(8, 2.2, 1, 1)
    _time(axes[0], found)
    return figure


# (stage, [(metric, label)], title)
_TRAINING: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    ("sft", (("loss", ""),), "SFT: loss (nats a token)"),
    ("reward", (("rewards/accuracies", ""),), "reward model: pairs ranked correctly (a tie is half)"),
    ("dpo", (("rewards/accuracies", ""),), "DPO: pairs its reward ranks correctly (a tie is half)"),
    ("dpo", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), "DPO: implicit rewards"),
    ("ppo", (("objective/scores", ""),), "PPO: score by the reward model"),
    ("ppo", (("objective/kl", ""),), "PPO: KL to SFT (nats a completion)"),
    ("ppo", (("objective/entropy", ""),), "PPO: entropy (nats a completion)"),
)
_SHADES = ("-", "--")


def _lines(axis: Any, found: Results, stage: str, metrics: Sequence[tuple[str, str]], title: str) -> None:
    for (metric, label), style in zip(metrics, _SHADES, strict=False):
        axis.plot(*_of(found.metrics[stage], metric), style, color=_COLOURS[stage], label=label or None)
    if any(label for _, label in metrics):
        axis.legend()
    if metrics[0][0] == "rewards/accuracies":
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def _of(rows: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """A metric's curve. A tie counts half: before an update DPO's model is its reference, and every pair a tie."""
    if metric != "rewards/accuracies":
        return series(rows, metric)
    ties = dict(zip(*series(rows, "rewards/ties"), strict=True))
    steps, right = series(rows, metric)
    return steps, [value + ties.get(step, 0) / 2 for step, value in zip(steps, right, strict=True)]


def _win_rate(axis: Any, found: Results) -> None:
    for i, road in enumerate(("ppo", "dpo")):
        s = found.summary[road]
        below, above = s["win_rate"] - s["win_rate_low"], s["win_rate_high"] - s["win_rate"]
        axis.errorbar(s["win_rate"], i, xerr=[[below], [above]], fmt="o", capsize=6, color=_COLOURS[road], markersize=8)
        axis.annotate(f"{s['win_rate']:.1%}", (s["win_rate"], i), (0, 9), textcoords="offset points", ha="center")
    axis.axvline(HARM, color="black", linewidth=1)
    axis.axvline(GOOD, color="black", linewidth=1, linestyle="--")
    axis.annotate(f"{GOOD:.0%}: guides call this good", (GOOD, -0.5), (4, 0), textcoords="offset points", fontsize=8)
    axis.set(xlim=(0, 1.02), ylim=(-0.6, 1.75), yticks=[0, 1], yticklabels=["PPO", "DPO"])
    axis.set_title(f"win rate against SFT (gold), even at {HARM:.0%};\nintervals: 95 %, over prompts", fontsize=10)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3, axis="x")


def _frontier(axis: Any, found: Results) -> None:
    kl = dict(zip(*series(found.metrics["ppo"], "objective/kl"), strict=True))
    path = [
        (kl[step], gold) for step, gold in zip(*gold_over_training(found.workdir, "ppo"), strict=True) if step in kl
    ]
    if path:
        axis.plot(*zip(*path, strict=True), ".-", color=_COLOURS["ppo"], alpha=0.35)
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    for name in ("sft", "dpo", "ppo"):
        s = found.summary[name]
        if s.get("kl") is not None:
            at = (s["kl"], s["gold_reward"])
            axis.scatter(*at, color=_COLOURS[name], s=90, zorder=3)
            # Labels at the points: a legend would cover points of some run.
            right = name != "dpo"  # the two roads may end side by side
            side = {"xytext": (8 if right else -8, 6), "ha": "left" if right else "right"}
            axis.annotate(name.upper(), at, textcoords="offset points", color=_COLOURS[name], bbox=box, **side)
    axis.margins(0.12)
    axis.set_title("gold reward against distance from SFT;\nline: samples that PPO logged", fontsize=10)
    axis.set(xlabel="KL to SFT (nats a completion)", ylabel="gold reward")
    axis.grid(alpha=0.3)


def _proxy_and_gold(axis: Any, found: Results) -> None:
    axis.plot(*series(found.metrics["ppo"], "objective/scores"), color=_COLOURS["reward"])
    axis.set_ylabel("score by the reward model", color=_COLOURS["reward"])
    other = axis.twinx()
    steps, gold = gold_over_training(found.workdir, "ppo")
    if steps:
        other.plot(steps, gold, ".-", color=_COLOURS["ppo"], alpha=0.6, label="logged samples")
    after = found.summary["ppo"]["gold_reward"]
    other.axhline(after, color=_COLOURS["ppo"], linestyle=":", label="held-out prompts, after training")
    other.set_ylim(-1.05, 1.05)
    other.legend(loc="lower right", fontsize=8)
    other.set_ylabel("gold reward", color=_COLOURS["ppo"])
    axis.set_title("what PPO is told, and what is so", fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def _held(axis: Any, found: Results) -> None:
    for i, name in enumerate(STAGES):
        left = 0.0
        parts = found.done[name]["model_bytes"] | {"optimizer": found.done[name]["optimizer_bytes"]}
        for role in (r for r in _ROLES if r in parts):
            label = "reference" if role == "ref" else role
            size = parts[role] / _MIB
            axis.barh(i, size, left=left, color=_ROLES[role], label=label, edgecolor="white")
            left += size
        axis.annotate(f"{left:.2f}", (left, i), (4, -3), textcoords="offset points", fontsize=9)
    by_label = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(by_label.values(), by_label.keys(), fontsize=8)
    axis.set(yticks=range(len(STAGES)), yticklabels=[n.upper() for n in STAGES])
    axis.invert_yaxis()
    axis.set_title("weights and optimizer (MiB)", fontsize=10)
    axis.set_xlim(right=1.15 * axis.dataLim.xmax)


def _needed(axis: Any, found: Results) -> None:
    for i, name in enumerate(STAGES):
        done = found.done[name]
        step = done["step_memory"].get("total", 0) / _MIB
        axis.barh(i - 0.2, step, 0.36, color=_COLOURS[name])
        axis.barh(i + 0.2, done["peak_memory_bytes"] / _MIB, 0.36, color=_COLOURS[name], alpha=0.35)
        axis.annotate(f"step {step:,.0f}", (step, i - 0.2), (4, -3), textcoords="offset points", fontsize=8)
        axis.annotate(
            f"peak {done['peak_memory_bytes'] / _MIB:,.0f}",
            (done["peak_memory_bytes"] / _MIB, i + 0.2), (4, -3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axis.set(yticks=range(len(STAGES)), yticklabels=[n.upper() for n in STAGES])
    axis.invert_yaxis()
    axis.set_title("one training step; peak of the process (MiB)", fontsize=10)
    axis.set_xlim(right=1.3 * axis.dataLim.xmax)


def _time(axis: Any, found: Results) -> None:
    for i, names in enumerate(ROADS.values()):
        left = 0.0
        for name in names:
            spent = found.summary[name]["wall_seconds"]
            axis.barh(i, spent, left=left, color=_COLOURS[name], edgecolor="white")
            axis.annotate(f"{name}\n{spent:.0f} s", (left + spent / 2, i), ha="center", va="center", fontsize=8)
            left += spent
        axis.annotate(f"{left:.0f} s", (left, i), (5, -3), textcoords="offset points")
    axis.set(yticks=range(len(ROADS)), yticklabels=list(ROADS))
    axis.invert_yaxis()
    axis.set_title("wall time of each road (s)", fontsize=10)
    axis.set_xlim(right=1.15 * axis.dataLim.xmax)
