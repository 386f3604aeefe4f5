"""The stories run: a small pretrained model on real data, judged by a classifier that training never saw.

IMDb, training half -> sft, reward -> pairs of samples -> dpo, ppo -> compared with sft under the judge
IMDb, test half     -> the judge, a bag of words
rasbt-preference, hh-rlhf -> sft, reward, dpo each -> accuracy on held-out pairs
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxalign.config import to_dict
from jaxalign.evaluate.winrate import wilson, win_rate
from jaxalign.evaluate.wordbag import WordBag, accuracy, fit
from jaxalign.examples import reviews
from jaxalign.pipeline import stages
from jaxalign.pipeline.configfile import load_config, run_script
from jaxalign.pipeline.keys import file_digest
from jaxalign.rollout.sampling import Sampling

CONFIG = "configs/stories.py"
SETS = ("polite", "hh")  # the sets whose pairs are used as they stand
ROADS = ("dpo", "ppo")


def run(config: Any, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs what is not done yet, and sums up what there is.

    Args:
      config: the tree of `configs/stories.py`.
      log: receives lines of text.

    Returns:
      The summary, also written to `workdir/summary.json`: data, judge, a section for each stage.
    """
    started = time.monotonic()
    workdir = Path(config.workdir)
    facts = _prepare(config)
    judge = _judge(config, log)
    names = tuple(config.stages)
    first = tuple(name for name in names if name in ("sft", "reward"))
    if first and "dpo" in names:
        stages.run(_only(config, first), log=log)
        if not _done(workdir, first):
            return {}
        facts["pairs"] = _label(config, log)
    stages.run(config, log=log)
    if not _done(workdir, names):
        return {}

    done = {name: json.loads((workdir / name / "DONE").read_text()) for name in names}
    summary: dict[str, Any] = {name: _cost(result) for name, result in done.items()}
    summary |= {"data": facts, "judge": judge["accuracy"]}
    _accuracies(summary, done)
    samples = {road: _sentiment(config, road, summary, judge["judge"], log) for road in ROADS if road in names}
    for name in SETS:
        if f"{name}_dpo" in names and f"{name}_reward" in names:
            samples[f"{name}_dpo"] = _own_reward(config, name, summary, log)
    summary["samples"] = samples
    summary["stage_seconds"] = sum(result["wall_seconds"] for result in done.values())
    summary["wall_seconds"] = time.monotonic() - started
    summary["config"] = to_dict(config)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _only(config: Any, names: tuple[str, ...]) -> Any:
    """The configuration with fewer stages."""
    part = config.copy_and_resolve_references()
    with part.unlocked():
        part.stages = names
    return part


def _done(workdir: Path, names: Sequence[str]) -> bool:
    return all(stages.is_done(str(workdir / name)) for name in names)


def _kept(path: Path, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cached result with the same key, or a new one that is then cached."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if path.exists() and (found := json.loads(path.read_text())).get("key") == digest:
        return found["result"]
    result = make()
    path.write_text(json.dumps({"key": digest, "result": result}, indent=1))
    return result


def _stage_key(config: Any, name: str) -> str:
    """The key of a finished stage."""
    return json.loads(Path(config.workdir, name, stages.RECORD).read_text())["key"]


# ---- before training -----------------------------------------------------------------------------------------


def _prepare(config: Any) -> dict[str, Any]:
    directory = Path(config.workdir, "data")
    directory.mkdir(parents=True, exist_ok=True)
    sizes = config.prepare
    key = [to_dict(sizes), Path(reviews.__file__).read_text()]
    return _kept(directory / "made.json", key, lambda: reviews.write_data(directory, Path(sizes.shared), sizes))


def _judge(config: Any, log: Callable[[str], None]) -> dict[str, Any]:
    """The judge, and its accuracy on the half of the reviews that it was not trained on."""
    sizes, path = config.prepare, Path(config.workdir, "data/judge.npz")

    def make() -> dict[str, Any]:
        log("judge: a bag of words on IMDb's test half")
        taught = reviews.read_lines(Path(sizes.shared) / "data/imdb/test.jsonl.gz")[: sizes.judge_reviews]
        judge = fit([r["text"] for r in taught], [r["label"] for r in taught])
        judge.save(path)
        unseen = reviews.read_lines(Path(config.workdir, "data/judge_reviews.jsonl"))
        short = reviews.passages(unseen, reviews.opening, sizes.min_words, sizes.max_words)
        return {
            "trained_on": len(taught),
            "reviews": len(unseen),
            "accuracy": accuracy(judge, *_columns(unseen)),
            "openings": len(short),
            "accuracy_on_openings": accuracy(judge, *_columns(short)),
        }

    read = file_digest(str(path.parent / "judge_reviews.jsonl"))
    found = _kept(path.with_suffix(".json"), [sizes.judge_reviews, sizes.min_words, sizes.max_words, read], make)
    return {"judge": WordBag.load(path), "accuracy": found}


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[int]]:
    return [row["text"] for row in rows], [row["label"] for row in rows]


def _label(config: Any, log: Callable[[str], None]) -> dict[str, Any]:
    """Writes DPO's pairs: two samples of the SFT model to each prompt, the better one by the reward model first."""
    data = Path(config.workdir, "data")
    key = _pairs_key(config)

    def make() -> dict[str, Any]:
        from jaxalign.data.records import Record
        from jaxalign.pipeline.loaded import load_model
        from jaxalign.rewards.load import load_scorer
        from jaxalign.rewards.samples import Samples

        started = time.monotonic()
        asked = [line["prompt"] for line in reviews.read_lines(data / "prompts.jsonl")[: config.prepare.dpo_prompts]]
        log(f"pairs: two samples of the SFT model to each of {len(asked)} prompts, ordered by the reward model")
        loaded = load_model(str(Path(config.workdir, "sft/export")), head="lm")
        generator = loaded.generator(Sampling.of(config.dpo.rollout), batch_size=128)
        found = generator(asked * 2, seed=config.seed)
        records = [Record(i, "prompts", i + 1, "prompt", prompt=p) for i, p in enumerate(asked * 2)]
        ends = [c.finished for c in found]
        scorer = load_scorer(
            str(Path(config.workdir, "reward/export")), dtype="float32", mesh=loaded.mesh, batch_size=128
        )
        scores = scorer(Samples(asked * 2, [c.text for c in found], [c.ids for c in found], ends, records, 0))
        pairs = ordered_pairs(asked, found, scores, loaded.tokenizer.eos_token)
        train, heldout = reviews.hold_out(pairs, lambda row: row["prompt"], max(1, len(pairs) // 10))
        reviews.write_lines(data / "pairs.jsonl", train)
        reviews.write_lines(data / "pairs_heldout.jsonl", heldout)
        return {
            "prompts": len(asked),
            "finished": sum(ends) / len(ends),
            "train": len(train),
            "heldout": len(heldout),
            "seconds": time.monotonic() - started,
        }

    return _kept(data / "pairs.json", key, make)


def _pairs_key(config: Any) -> list[Any]:
    asked = [config.prepare.dpo_prompts, file_digest(str(Path(config.workdir, "data/prompts.jsonl")))]
    return [_stage_key(config, "sft"), _stage_key(config, "reward"), asked, to_dict(config.dpo.rollout)]


def ordered_pairs(
    asked: Sequence[str], found: Sequence[Any], scores: Sequence[float], eos: str
) -> list[dict[str, str]]:
    """Pairs of two samples to each prompt, the better one first; equal and empty ones are left out.

    A finished sample brings its EOS as text; an unfinished one must not be given one that it never had.

    Args:
      asked: prompts.
      found: completions of all prompts, then of all prompts again.
      scores: of each completion.
      eos: the tokenizer's EOS token.
    """
    said = [c.text + eos * c.finished for c in found]
    pairs = []
    for one, other in ((i, i + len(asked)) for i in range(len(asked))):
        if scores[one] != scores[other] and found[one].text.strip() and found[other].text.strip():
            best, worst = (one, other) if scores[one] > scores[other] else (other, one)
            pairs.append({"prompt": asked[one], "chosen": said[best], "rejected": said[worst]})
    return pairs


# ---- after training ------------------------------------------------------------------------------------------


def _cost(done: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": done["steps"],
        "seconds": done["wall_seconds"],
        "peak_memory_bytes": done["peak_memory_bytes"],
        "train_loss": next(v for k, v in done["metrics"].items() if k in ("loss", "loss/policy")),
        "eval": done.get("eval"),
    }


def _accuracies(summary: dict[str, Any], done: dict[str, Any]) -> None:
    """Each reward's accuracy on held-out pairs, with its interval."""
    files = {"reward": "labels", "dpo": "pairs"} | {f"{s}_{kind}": s for s in SETS for kind in ("reward", "dpo")}
    for name, file in files.items():
        if name in done:
            facts = summary["data"]
            count = facts["pairs"]["heldout"] if file == "pairs" else facts["counts"][f"{file}_heldout"]
            rate = done[name]["eval"]["eval/rewards/accuracies"]
            low, high = wilson(rate * count, count, confidence=0.95)
            summary[name]["accuracy"] = {"rate": rate, "low": low, "high": high, "pairs": count}


def _compare(config: Any, base: str, aligned: str, reward: str, prompts: str, count: int, log) -> dict[str, Any]:
    """Two stages' models side by side, under a stage's reward model."""
    from jaxalign.pipeline.compare import compare

    key = [
        [_stage_key(config, name) for name in (base, aligned, reward)],
        prompts,
        count,
        to_dict(config[aligned].rollout),
    ]

    def make() -> dict[str, Any]:
        log(f"compare: {aligned} with {base}")
        at = {name: str(Path(config.workdir, name, "export")) for name in (base, aligned, reward)}
        return compare(
            at[base],
            at[aligned],
            str(Path(config.workdir, "data", f"{prompts}.jsonl")),
            Sampling.of(config[aligned].rollout),
            reward=at[reward],
            num_prompts=count,
            confidence=0.95,
            seed=config.seed,
        )

    return _kept(Path(config.workdir, f"compare_{aligned}.json"), key, make)


def _quality(summary: dict[str, Any], base: str, aligned: str, found: dict[str, Any]) -> None:
    kept = ("kl_to_base", "finished", "mean_length", "distinct_1", "distinct_2", "repetition_4", "reward")
    for name, model in ((base, "base"), (aligned, "aligned")):
        summary[name] |= {key: found["models"][model][key] for key in kept}
    summary[aligned]["own_win_rate"] = {k: found["win_rate"][k] for k in ("rate", "low", "high")}


def _sentiment(config: Any, road: str, summary: dict[str, Any], judge: WordBag, log) -> list[dict[str, Any]]:
    """DPO or PPO against SFT on held-out prompts, under the judge."""
    found = _compare(config, "sft", road, "reward", "prompts_heldout", config.prepare.heldout_prompts, log)
    _quality(summary, "sft", road, found)
    samples = found["samples"]
    odds = {model: judge.scores([s["prompt"] + s[model] for s in samples]) for model in ("base", "aligned")}
    rate = win_rate(odds["base"], odds["aligned"], confidence=0.95)
    summary[road]["win_rate"] = {**rate._asdict(), "prompts": len(samples)}
    for name, model in (("sft", "base"), (road, "aligned")):
        summary[name]["positive"] = sum(o > 0 for o in odds[model]) / len(samples)
    # A judge that sums over words may prefer long texts, so its odds per word are reported too.
    words = {m: [max(len((s["prompt"] + s[m]).split()), 1) for s in samples] for m in odds}
    each = {m: [o / n for o, n in zip(odds[m], words[m], strict=True)] for m in odds}
    summary[road]["win_rate_per_word"] = win_rate(each["base"], each["aligned"], confidence=0.95).rate
    return [
        {"prompt": s["prompt"], "sft": s["base"], road: s["aligned"], "judge": [a, b]}
        for s, a, b in zip(samples[:6], odds["base"], odds["aligned"], strict=False)
    ]


def _own_reward(config: Any, name: str, summary: dict[str, Any], log) -> list[dict[str, Any]]:
    """DPO against SFT under the set's own reward model; no independent judge knows what is polite or helpful."""
    base, aligned = f"{name}_sft", f"{name}_dpo"
    count = config.prepare.compared_prompts
    found = _compare(config, base, aligned, f"{name}_reward", f"{name}_heldout", count, log)
    _quality(summary, base, aligned, found)
    return [{"prompt": s["prompt"], base: s["base"], aligned: s["aligned"]} for s in found["samples"][:3]]


# ---- for people ----------------------------------------------------------------------------------------------


def _interval(rate: dict[str, Any] | None) -> str:
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})" if rate else ""


# (title, how a stage's figure is shown)
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("held-out pairs ranked correctly", lambda s: _interval(s.get("accuracy"))),
    ("win rate over SFT, judge", lambda s: _interval(s.get("win_rate"))),
    ("by own reward model", lambda s: _interval(s.get("own_win_rate"))),
    ("judged positive", lambda s: f"{s['positive']:.1%}" if "positive" in s else ""),
    ("KL to SFT", lambda s: f"{s['kl_to_base']:.2f}" if s.get("kl_to_base") is not None else ""),
    ("finished", lambda s: f"{s['finished']:.1%}" if "finished" in s else ""),
    ("tokens", lambda s: f"{s['mean_length']:.0f}" if "mean_length" in s else ""),
    ("distinct pairs", lambda s: f"{s['distinct_2']:.1%}" if "distinct_2" in s else ""),
    ("time", lambda s: f"{s['seconds']:.0f} s"),
)


def page(summary: dict[str, Any], width: int = 190) -> str:
    """The summary for people: a table and samples side by side."""
    import io

    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, markup=False)
    for samples in summary["samples"].values():
        names = [key for key in samples[0] if key not in ("prompt", "judge")]
        table = Table("prompt", *names, show_lines=True, expand=True)
        for sample in samples[:3]:
            asked = sample["prompt"]
            asked = asked if isinstance(asked, str) else asked[-1]["content"]
            odds = sample.get("judge", [None] * len(names))
            cells = [
                sample[n].strip() + ("" if o is None else f"\n[judge {o:+.1f}]")
                for n, o in zip(names, odds, strict=True)
            ]
            table.add_row(asked, *cells)
        console.print(table)
    figures = Table("stage", *(title for title, _ in _COLUMNS))
    for name in summary["config"]["stages"]:
        figures.add_row(name, *(show(summary[name]) for _, show in _COLUMNS))
    console.print(figures)
    judge, longer = summary["judge"], summary["data"]["longer_is_better"]
    console.print(
        f"judge: a bag of words trained on {judge['trained_on']:,} reviews of IMDb's test half; right about "
        f"{judge['accuracy']:.1%} of {judge['reviews']:,} reviews of the other half, "
        f"{judge['accuracy_on_openings']:.1%} of their openings"
    )
    console.print(
        "the longer side of a held-out pair is the chosen one: " + ", ".join(f"{k} {v:.1%}" for k, v in longer.items())
    )
    console.print(f"stages {summary['stage_seconds'] / 60:.1f} min")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def main(argv: Sequence[str]) -> int:
    """`python -m jaxalign.examples.stories [--config.field=value ...]`; the fields are those of its config."""
    return run_script("stories", argv, _run_and_show, CONFIG)


def _run_and_show(overrides: Sequence[tuple[str, str | None]]) -> None:
    workdirs = [value for name, value in overrides if name == "workdir"]  # the data lie in it
    config = load_config(":".join([CONFIG, *workdirs[-1:]]), overrides)
    summary = run(config)
    if summary:
        print(page(summary))
        print(f"summary   {Path(config.workdir, 'summary.json')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
