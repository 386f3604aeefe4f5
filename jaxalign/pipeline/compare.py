"""Two models side by side on held-out prompts."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.config import defaults
from jaxalign.data.dialogues import render_plain
from jaxalign.data.mixture import load_records
from jaxalign.data.records import Record
from jaxalign.data.source import parse_sources
from jaxalign.data.template_inputs import set_defaults
from jaxalign.evaluate.diversity import distinct_ngrams, distinct_samples, length_correlation, repetition
from jaxalign.evaluate.heldout import Question, questions, references
from jaxalign.evaluate.perplexity import perplexity
from jaxalign.evaluate.sequences import Tokens, completion_logprobs
from jaxalign.evaluate.winrate import GOOD, HARM, win_rate
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.startup import start
from jaxalign.pipeline.loaded import Loaded, check_weights, load_model, require_head, warn_of_context
from jaxalign.ranges import check_flags
from jaxalign.rewards.model import same_tokenizer
from jaxalign.rewards.samples import Samples
from jaxalign.rollout.engine import Completion
from jaxalign.rollout.sampling import Sampling

# The verdict where every prompt is a tie, and the interval means nothing.
SAME = "undecided: the reward gave both the same score on every prompt; another reward may tell them apart"


def compare(
    base: str,
    aligned: str,
    data: str | Sequence[Any],
    sampling: Sampling,
    *,
    reward: str | None,
    num_prompts: int | None,
    confidence: float,
    seed: int,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares two models' samples on the same held-out prompts.

    Args:
      base: the model before: directory or hub id.
      aligned: the model after.
      data: held-out records as training reads them: a source or several, each a path or a dict.
      sampling: how both models answer.
      reward: what decides who wins: a reward model, or a function by name; None: no win rate.
      num_prompts: how many of the data's records; None: all.
      confidence: of the win rate's interval, between 0 and 1.
      seed: of the samples, the same for both models.
      dtype: of weights and computation; None: the configuration's default.
      chat_template_kwargs: values of names that both models' chat templates read.

    Returns:
      JSON values: `win_rate` (None without a reward or prompts), `models` (figures of `base` and `aligned`),
      `same_tokenizer` and `samples` (prompt, both completions, both rewards). A figure that is not defined is None.

    Raises:
      InputError: models, data, reward or a value that cannot be used.
    """
    data = (data,) if isinstance(data, str) else tuple(data)
    check_flags(seed=seed, confidence=confidence, num_prompts=num_prompts)
    for flag, path in (("--base", base), ("--aligned", aligned)):
        tokenizer = require_head(path, "lm", flag)[1]
        set_defaults(tokenizer, chat_template_kwargs or {}, "--chat_template_kwargs")
    scorer, reach = (None, None) if reward is None else _scorer(reward, dtype)
    records = list(load_records(data, None, max_records=num_prompts, field="data.sources")[0])
    asked = questions(records)
    prompted = [q.record._replace(form="prompt", prompt=q.prompt) for q in asked]
    if base != aligned:
        check_weights(base, head="lm", dtype=dtype, flag="--base")  # it is loaded late: check it now

    answers: dict[str, list[Completion]] = {}
    figures: dict[str, dict[str, Any]] = {"base": {}, "aligned": {}}
    tokenizers: list[Any] = []
    said: list[Tokens] = []  # the aligned model's samples, which the base scores too
    for name, path in (("aligned", aligned), ("base", base)):  # one after the other: one model in memory
        loaded = load_model(path, head="lm", dtype=dtype, chat_template_kwargs=chat_template_kwargs)
        generator = loaded.generator(sampling)
        prompts = generator.encode(prompted) if asked else []
        answers[name] = generator(prompted, seed=seed) if asked else []
        sizes = [len(p) + len(c.ids) for p, c in zip(prompts, answers[name], strict=True)]
        warn_of_context(path, loaded.context, sizes, [_sample(q) for q in asked])
        figures[name] = {"path": path, **_perplexity(loaded, records, data), **_figures(answers[name])}
        if name == "aligned":
            said = [Tokens(p.tolist(), c.ids) for p, c in zip(prompts, answers[name], strict=True)]
        if not tokenizers or same_tokenizer(tokenizers[0], loaded.tokenizer):
            figures[name]["logprob"] = completion_logprobs(loaded.model, loaded.params, said, loaded.mesh)
        tokenizers.append(loaded.tokenizer)
        del loaded, generator
        gc.collect()
    figures["aligned"]["kl_to_base"] = _kl(figures["aligned"].pop("logprob"), figures["base"].pop("logprob", None))
    figures["base"]["kl_to_base"] = 0.0

    if scorer and reach:
        read = [
            scorer.tokens(q.prompt, c.text, c.finished, q.record.columns) for q, c in zip(asked, answers["aligned"])
        ]
        warn_of_context(str(reward), reach, list(map(len, read)), [_sample(q) for q in asked])
    scores = {name: _scores(scorer, asked, found) for name, found in answers.items()}
    for name, found in answers.items():
        known = [(len(c.ids), s) for c, s in zip(found, scores[name], strict=True) if s is not None]
        lengths, values = zip(*known, strict=True) if known else ((), ())
        figures[name]["reward"] = math.fsum(values) / len(values) if values else math.nan
        figures[name]["length_reward_correlation"] = length_correlation(lengths, values)
    rate = win_rate(scores["base"], scores["aligned"], confidence=confidence)
    decided = rate.wins + rate.ties + rate.losses
    if rate.ties == decided:
        rate = rate._replace(verdict=SAME)
    return _json(
        {
            "data": data[0] if len(data) == 1 and isinstance(data[0], str) else list(data),
            "reward": reward,
            "num_prompts": len(asked),
            "sampling": sampling._asdict() | {"seed": seed},
            "win_rate": {**rate._asdict(), "lines": {"harm": HARM, "good": GOOD}} if decided else None,
            "same_tokenizer": same_tokenizer(*tokenizers),
            "models": figures,
            "samples": [
                {
                    "prompt": question.prompt,
                    "base": one.text,
                    "aligned": other.text,
                    "base_reward": before,
                    "aligned_reward": after,
                }
                for question, one, other, before, after in zip(
                    asked, answers["base"], answers["aligned"], scores["base"], scores["aligned"], strict=True
                )
            ],
        }
    )


def _sample(question: Question) -> str:
    return f"a sample for {question.record.source}:{question.record.line}"


def _scorer(reward: str, dtype: str | None) -> tuple[Any, int | None]:
    """The reward, loaded before anything is generated, and its context length if it is a model."""
    from jaxalign.rewards.load import load_scorer

    reach = None if ":" in reward else require_head(reward, "score", "--reward")[0].context
    common = defaults("sft")
    start()
    scorer = load_scorer(reward, dtype=dtype or common.model.dtype, mesh=make_mesh(common.mesh))
    return scorer, reach


def _scores(scorer: Any, asked: Sequence[Question], found: Sequence[Completion]) -> list[float | None]:
    if scorer is None or not asked:
        return [None] * len(found)
    return scorer(
        Samples(
            prompts=[q.prompt for q in asked],
            completions=[c.text for c in found],
            completion_ids=[c.ids for c in found],
            finished=[c.finished for c in found],
            records=[q.record for q in asked],
            step=0,
        )
    )


def _perplexity(loaded: Loaded, records: Sequence[Record], data: Sequence[Any]) -> dict[str, Any]:
    """Perplexity of the data's reference answers."""
    tokens = references(records, loaded.tokenizer, loaded.stop_ids, render_plain)
    paths = ", ".join(source.path for source in parse_sources(data))
    sizes = [len(t.prompt) + len(t.completion) for t in tokens]
    warn_of_context(loaded.path, loaded.context, sizes, [f"an answer of {paths}"] * len(tokens))
    sums = completion_logprobs(loaded.model, loaded.params, tokens, loaded.mesh)
    counts = [sum(t.scored) if t.scored is not None else len(t.completion) for t in tokens]
    return {"perplexity": perplexity(sums, counts), "perplexity_tokens": sum(counts)}


def _kl(policy: Sequence[float], base: Sequence[float] | None) -> float:
    """Mean of log(policy / base) over the policy's own samples: an estimate of the KL, in nats a completion.

    Unbiased where the samples are drawn at temperature 1 from the whole vocabulary.  Not defined without samples, or
    where the two have other tokens.
    """
    if not policy or base is None:
        return math.nan
    return math.fsum(p - b for p, b in zip(policy, base, strict=True)) / len(policy)


def _figures(found: Sequence[Completion]) -> dict[str, Any]:
    """Diversity and length of a model's samples; n-grams are of words."""
    words = [c.text.split() for c in found]
    count = len(found)
    return {
        "finished": sum(c.finished for c in found) / count if count else math.nan,
        "mean_length": sum(len(c.ids) for c in found) / count if count else math.nan,
        "distinct_1": distinct_ngrams(words, 1),
        "distinct_2": distinct_ngrams(words, 2),
        "repetition_4": repetition(words, 4),
        "distinct_samples": distinct_samples([c.text for c in found]),
    }


def _json(value: Any) -> Any:
    """JSON values; NaN becomes None."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# (key, what it is called on the page, format)
_ROWS = (
    ("reward", "mean reward", "{:.4g}"),
    ("kl_to_base", "KL to the base (nats a completion)", "{:.3f}"),
    ("perplexity", "perplexity of the data's answers", "{:.3f}"),
    ("finished", "finished completions", "{:.1%}"),
    ("mean_length", "tokens a completion", "{:.1f}"),
    ("distinct_1", "distinct words", "{:.1%}"),
    ("distinct_2", "distinct word pairs", "{:.1%}"),
    ("repetition_4", "repeated four-word phrases", "{:.1%}"),
    ("distinct_samples", "distinct completions", "{:.1%}"),
    ("length_reward_correlation", "correlation of length and reward", "{:.2f}"),
)


def page(result: dict[str, Any], *, show: int, width: int = 120) -> str:
    """The result of `compare` for people.

    Args:
      result: what `compare` returned.
      show: how many samples.
      width: of the page, in characters.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    models = result["models"]
    samples = Table("prompt", "base", "aligned", show_lines=True, expand=True)
    for sample in result["samples"][:show]:
        samples.add_row(
            Text(_shown(sample["prompt"])),
            Text(_with_reward(sample["base"], sample["base_reward"])),
            Text(_with_reward(sample["aligned"], sample["aligned_reward"])),
        )
    if result["samples"][:show]:
        console.print(samples)
    figures = Table("", "base", "aligned")
    for key, name, form in _ROWS:
        if models["base"][key] is not None or models["aligned"][key] is not None:
            cells = ("-" if models[m][key] is None else form.format(models[m][key]) for m in ("base", "aligned"))
            figures.add_row(name, *cells)
    console.print(figures)
    if not result["same_tokenizer"]:
        console.print("the two tokenizers differ: perplexities and lengths count other tokens and do not compare")
    for name in ("base", "aligned"):
        if models[name]["finished"] == 0:
            most = result["sampling"]["max_new_tokens"]
            console.print(
                f"no completion of {name} ended by itself within {most} tokens: a larger --max_new_tokens may show"
                " whole ones; a model that was not trained to stop never ends"
            )
    rate = result["win_rate"]
    if result["reward"] is None:
        console.print("no win rate: it takes a --reward, a reward model's directory or FILE.py:FUNCTION")
    if rate is not None:
        console.print(
            f"win rate of aligned over base: {rate['rate']:.1%} "
            f"({rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses), "
            f"{rate['confidence']:.0%} interval {rate['low']:.1%} to {rate['high']:.1%}"
        )
        console.print(_scale(rate["low"], rate["rate"], rate["high"]))
        console.print(rate["verdict"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _scale(low: float, rate: float, high: float) -> str:
    """The interval as a line of text from 0 to 100 %, with marks at 50 and 55 %.

    >>> print(_scale(0.6, 0.7, 0.8))
    0% .........................|..|.[====o====].......... 100%   (| at 50% and 55%)
    """
    cells = ["."] * 51
    for line in (HARM, GOOD):
        cells[round(line * 50)] = "|"
    first, last = round(low * 50), round(high * 50)
    cells[first + 1 : last] = "=" * max(0, last - first - 1)
    cells[first], cells[last] = "[", "]"
    cells[round(rate * 50)] = "o"
    return f"0% {''.join(cells)} 100%   (| at 50% and 55%)"


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _with_reward(text: str, reward: float | None) -> str:
    return text.strip() if reward is None else f"{text.strip()}\n[{reward:.4g}]"
