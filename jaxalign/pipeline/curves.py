"""Pictures of a run with both roads: what the notebook and the quickstart show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COLOURS = {"sft": "#7f7f7f", "reward": "#9467bd", "dpo": "#1f77b4", "ppo": "#d62728"}


def read(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's metrics, a dict for each logged step."""
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(workdir: Path) -> Path:
    """Draws the stages' curves and the two roads beside each other, to `workdir/curves.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    summary = json.loads((workdir / "summary.json").read_text())
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    panels = (
        ("sft", "loss", "SFT: loss (nats a token)"),
        ("reward", "rewards/accuracies", "reward model: pairs ranked rightly"),
        ("dpo", "rewards/margins", "DPO: implicit reward margin"),
        ("ppo", "objective/scores", "PPO: score of the reward model"),
        ("ppo", "objective/kl", "PPO: KL to the reference (nats)"),
    )
    for axis, (stage, metric, title) in zip(axes.flat, panels, strict=False):
        axis.plot(*series(read(workdir, stage), metric), color=_COLOURS[stage])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    _roads(axes.flat[5], summary)
    _frontier(axes.flat[6], summary)
    _memory(axes.flat[7], summary)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _roads(axis: Any, summary: dict[str, Any]) -> None:
    for i, road in enumerate(("dpo", "ppo")):
        s = summary[road]
        below, above = s["win_rate"] - s["win_rate_low"], s["win_rate_high"] - s["win_rate"]
        axis.bar(i, s["win_rate"], color=_COLOURS[road], yerr=[[below], [above]], capsize=6)
    axis.axhline(0.5, color="black", linewidth=1)
    axis.axhline(0.55, color="black", linewidth=1, linestyle="--")
    axis.set(title="win rate against SFT (gold)", ylim=(0, 1), xticks=[0, 1], xticklabels=["DPO", "PPO"])


def _frontier(axis: Any, summary: dict[str, Any]) -> None:
    for name in ("sft", "dpo", "ppo"):
        s = summary[name]
        axis.scatter(s["kl"] or 0.0, s["gold_reward"], color=_COLOURS[name], s=80, label=name.upper(), zorder=3)
    axis.set(title="gold reward against KL", xlabel="KL to SFT (nats)", ylabel="gold reward")
    axis.legend()
    axis.grid(alpha=0.3)


def _memory(axis: Any, summary: dict[str, Any]) -> None:
    names = ("sft", "reward", "dpo", "ppo")
    weights = [summary[n]["model_bytes"] / 2**20 for n in names]
    optimizer = [summary[n]["optimizer_bytes"] / 2**20 for n in names]
    axis.bar(names, weights, label="weights of all models", color="#4c9f70")
    axis.bar(names, optimizer, bottom=weights, label="optimizer", color="#c9e4ca")
    axis.set(title="memory that stays (MiB)")
    axis.legend()
