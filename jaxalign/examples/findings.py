"""A quickstart run's report as Markdown: metrics, samples, and which claims they support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxalign.evaluate.winrate import GOOD, HARM
from jaxalign.examples.curves import ROADS, STAGES, Results

_Show = Callable[[dict[str, Any]], str]


def _shown(key: str, form: str) -> _Show:
    return lambda s: form.format(s[key]) if s.get(key) is not None else ""


# (title, how a stage's figures show it)
FIGURES: tuple[tuple[str, _Show], ...] = (
    ("gold reward, held out", _shown("gold_reward", "{:.3f}")),
    (
        "win rate against SFT",
        lambda s: (
            f"{s['win_rate']:.1%} ({s['win_rate_low']:.1%} to {s['win_rate_high']:.1%})" if "win_rate" in s else ""
        ),
    ),
    ("held-out pairs ranked correctly", _shown("accuracy", "{:.1%}")),
    ("KL to SFT, nats", _shown("kl", "{:.2f}")),
    ("finished completions", _shown("finished", "{:.1%}")),
    ("distinct word pairs", _shown("distinct_2", "{:.2%}")),
    ("tokens a completion", _shown("mean_length", "{:.1f}")),
    ("models in memory", lambda s: f"{len(s['models'])}: {', '.join(s['models'])}"),
    ("weights and optimizer, MiB", lambda s: f"{(s['model_bytes'] + s['optimizer_bytes']) / 2**20:.2f}"),
    ("peak of the process meanwhile, MiB", lambda s: f"{s['peak_memory_bytes'] / 2**20:,.0f}"),
    ("wall time, s", _shown("wall_seconds", "{:.0f}")),
)


def table(found: Results) -> str:
    """The stages' figures beside each other."""
    lines = [f"| | {' | '.join(name.upper() for name in STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    lines += [f"| {title} | {' | '.join(show(found.summary[n]) for n in STAGES)} |" for title, show in FIGURES]
    return "\n".join(lines)


def samples(found: Results, count: int = 4) -> str:
    """Completions of held-out prompts side by side, each with its gold reward."""
    names = ("sft", "dpo", "ppo")
    lines = ["| prompt | SFT | DPO | PPO |", "|---|---|---|---|"]
    for sample in found.summary["samples"][:count]:
        cells = (f"{_cell(sample[n])} **[{sample['gold'][n]:+.2f}]**" for n in names)
        lines.append(f"| {_cell(sample['prompt'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that stays within its cell."""
    return text.strip().replace("|", "\\|").replace("\n", " ")


def findings(found: Results) -> str:
    """What this run says about the claims of the guides, a point each; every number is this run's own."""
    s, done = found.summary, found.done
    held = {n: sum(done[n]["model_bytes"].values()) + done[n]["optimizer_bytes"] for n in ("dpo", "ppo")}
    weights = {n: sum(done[n]["model_bytes"].values()) for n in ("dpo", "ppo")}
    spent = {road: sum(s[n]["wall_seconds"] for n in names) for road, names in ROADS.items()}
    points = [
        f"**Memory.** DPO holds {len(done['dpo']['model_bytes'])} models and PPO {len(done['ppo']['model_bytes'])}: "
        f"the weights of PPO are {weights['ppo'] / weights['dpo']:.1f} times DPO's, and with the optimizers, of which "
        f"PPO has two, {held['ppo'] / held['dpo']:.1f} times. Activations, and PPO's sampling cache, come on top.",
        *(f"**{road.upper()}'s win rate.** {_verdict(s[road])}" for road in ("dpo", "ppo")),
        f"**Against each other.** {_between(s['dpo'], s['ppo'])}",
        f"**Time.** The road through DPO took {spent['DPO']:.0f} s, the one through a reward model and PPO "
        f"{spent['RLHF']:.0f} s, compilation included; {s['ppo']['wall_seconds']:.0f} s of these went to PPO itself, "
        "which samples as it learns.",
        f"**The reward model** ranks {s['reward']['accuracy']:.1%} of held-out pairs as the gold preference does; "
        f"DPO's implicit reward {s['dpo']['accuracy']:.1%}.",
    ]
    if s["dpo"].get("kl") is not None and s["ppo"].get("kl") is not None:
        points.append(f"**Price.** {_price(s)}")
    return "\n".join(f"- {point}" for point in points)


def _verdict(s: dict[str, Any]) -> str:
    rate, low, high = s["win_rate"], s["win_rate_low"], s["win_rate_high"]
    if low > GOOD:
        judged = f"clearly above the {GOOD:.0%} that guides call good"
    elif low > HARM:
        judged = f"clearly better than SFT, not clearly above the {GOOD:.0%} line"
    elif high < HARM:
        judged = "worse than SFT: training did harm"
    else:
        judged = f"not told apart from SFT: the interval holds {HARM:.0%}"
    return f"{rate:.1%}, with 95 % confidence over prompts between {low:.1%} and {high:.1%}: {judged}."


def _between(dpo: dict[str, Any], ppo: dict[str, Any]) -> str:
    if dpo["win_rate_low"] > ppo["win_rate_high"]:
        return "DPO's interval lies above PPO's: in this run DPO is the better of the two."
    if ppo["win_rate_low"] > dpo["win_rate_high"]:
        return "PPO's interval lies above DPO's: in this run PPO is the better of the two."
    return "The intervals overlap: this run does not clearly say which road is better."


def _price(s: dict[str, Any]) -> str:
    def gained(name):
        return s[name]["gold_reward"] - s["sft"]["gold_reward"]

    return (
        "; ".join(
            f"{n.upper()} gained {gained(n):+.2f} gold reward at a distance of {s[n]['kl']:.1f} nats"
            for n in ("dpo", "ppo")
        )
        + ". More reward at the same distance is the better bargain."
    )
