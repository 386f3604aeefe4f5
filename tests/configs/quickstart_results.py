"""A quickstart's directory with invented figures, in the form that a quickstart leaves: for tests of what reads it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from jaxalign.examples import world

_BYTES = {
    "sft": ("policy",),
    "reward": ("reward",),
    "dpo": ("policy", "ref"),
    "ppo": ("policy", "value", "ref", "reward"),
}
_NAMES = {"ref": "reference"}


def write(workdir: Path) -> Path:
    """Writes `summary.json`, and each stage's `metrics.jsonl` and `DONE`; PPO's samples too."""
    rng = random.Random(0)
    noise = lambda: rng.uniform(-0.02, 0.02)  # noqa: E731
    learned = {n: [1 - math.exp(-4 * i / 30) for i in range(31)] for n in _BYTES}
    curves = {
        "sft": {"loss": [3.5 - 2.6 * x for x in learned["sft"]]},
        "reward": {"rewards/accuracies": [0.5 + 0.45 * x + noise() for x in learned["reward"]]},
        "dpo": {
            "rewards/accuracies": [0.5 + 0.4 * x + noise() for x in learned["dpo"]],
            "rewards/chosen": [-0.5 * x for x in learned["dpo"]],
            "rewards/rejected": [-3 * x for x in learned["dpo"]],
        },
        "ppo": {
            "objective/scores": [-1 + 4 * x + noise() for x in learned["ppo"]],
            "objective/kl": [3.5 * x for x in learned["ppo"]],
            "objective/entropy": [9 - 5 * x for x in learned["ppo"]],
        },
    }
    summary: dict = {}
    for stage, roles in _BYTES.items():
        folder = workdir / stage
        folder.mkdir(parents=True, exist_ok=True)
        names = curves[stage]
        rows = [{"step": 10 * i + 1} | {name: values[i] for name, values in names.items()} for i in range(31)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = {
            "model_bytes": dict.fromkeys(roles, 700_000),
            "optimizer_bytes": 1_400_000 * (2 if stage == "ppo" else 1),
            "step_memory": {"arguments": 2_000_000, "results": 0, "temporary": 40_000_000, "total": 42_000_000},
            "peak_memory_bytes": 700_000_000,
            "wall_seconds": 60.0 + 10 * len(roles),
        }
        (folder / "DONE").write_text(json.dumps(done))
        summary[stage] = {
            "models": [_NAMES.get(role, role) for role in roles],
            "model_bytes": sum(done["model_bytes"].values()),
            "optimizer_bytes": done["optimizer_bytes"],
            "peak_memory_bytes": done["peak_memory_bytes"],
            "wall_seconds": done["wall_seconds"],
            "loss": 0.4,
        }
    quality = {"finished": 0.99, "distinct_2": 0.2, "mean_length": 17.0}
    summary["sft"] |= quality | {"gold_reward": 0.02, "kl": 0.0}
    summary["dpo"] |= quality | {"gold_reward": 0.71, "kl": 3.1, "accuracy": 0.93}
    summary["ppo"] |= quality | {"gold_reward": 0.62, "kl": 3.6}
    summary["dpo"] |= {"win_rate": 0.83, "win_rate_low": 0.80, "win_rate_high": 0.86}
    summary["ppo"] |= {"win_rate": 0.79, "win_rate_low": 0.76, "win_rate_high": 0.82}
    summary["reward"]["accuracy"] = 0.95
    summary["samples"] = [_sample(rng) for _ in range(4)]
    summary["wall_seconds"] = 400.0
    (workdir / "ppo" / "samples").mkdir()
    for step in range(1, 302, 50):
        lines = [
            {"step": step, "prompt": s.prompt, "completion": world.respond(s, rng, 0.5 + step / 700)}
            for s in _scenes(rng)
        ]
        (workdir / "ppo" / "samples" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def _scenes(rng: random.Random) -> list[world.Scene]:
    return [world.draw_scene(rng) for _ in range(16)]


def _sample(rng: random.Random) -> dict:
    scene = world.draw_scene(rng)
    said = {
        "sft": world.respond(scene, rng),
        "dpo": world.respond(scene, rng, 1.0),
        "ppo": world.respond(scene, rng, 0.9),
    }
    gold = {name: world.gold_reward(scene.prompt, text) for name, text in said.items()}
    return {"prompt": scene.prompt, **said, "gold": gold}
