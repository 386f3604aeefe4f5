"""Every field of the configuration as tables, from the code: default, what it may be, and its comment in the code."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxalign.config import defaults, get, leaves  # noqa: E402
from jaxalign.ranges import BOUNDS, CHOICES, REQUIRED  # noqa: E402
from jaxalign.registry import ALGORITHMS  # noqa: E402

# Where fields and their comments stand.
_FILES = ("jaxalign/config.py", "jaxalign/registry.py")

_ORDER = (
    "", "from", "model", "data", "algorithm", "rollout", "rewards",
    "optimizer", "mesh", "eval", "checkpoint", "logging",
)  # fmt: skip

# What the names of fields leave open and no comment in the code says.
_SAID = {
    "seed": "of everything that is random: initialisation, order of the data, samples",
    "workdir": "the run's directory, on disk or in an object store",
    "from.model": "name of the earlier stage that this one starts from",
    "from.reward": "ppo: name of the earlier stage whose reward model is the reward",
    "num_epochs": "passes over the data, where num_train_steps is not set",
    "grad_accum_steps": "parts in which batch_size is worked on; the result is that of the whole batch",
    "model.revision": "of a hub id: branch, tag or commit",
    "data.eval_sources": "held-out records, in the form of data.sources",
    "data.max_records": "records that are read of all sources together",
    "data.max_prompt_length": "tokens of the prompt alone",
    "data.max_completion_length": "tokens of the completion alone",
    "data.truncation": "what happens to a record that is too long",
    "data.packing": "many records in a row of row_length tokens",
    "data.shared_prompt": "both completions of a pair in one row around one copy of their prompt",
    "data.shuffle": "a new order in each epoch, from the seed",
    "mesh.data": "devices that split the batch and hold whole parameters; -1: what is left",
    "mesh.fsdp": "devices that split the batch and the parameters; -1: what is left",
    "mesh.tensor": "devices that split each layer; -1: what is left",
    "optimizer.learning_rate": "the peak of the schedule",
    "optimizer.value_learning_rate": "the same for the value model",
    "optimizer.schedule": "of the learning rate, after the warmup",
    "optimizer.warmup_steps": "steps of a linear rise from 0",
    "optimizer.b1": "decay of the first moment",
    "optimizer.b2": "decay of the second moment",
    "optimizer.eps": "added to the root of the second moment",
    "optimizer.weight_decay": "decoupled, scaled by the learning rate",
    "optimizer.decay_mask": "which weights decay: matrices alone, or all",
    "eval.every": "steps between evaluations; 0: at the end only",
    "eval.num_batches": "of an evaluation; none: all",
    "checkpoint.keep": "how many checkpoints stay",
    "checkpoint.best_mode": "whether less or more of best_metric is better",
    "logging.every": "steps between lines of metrics.jsonl",
    "logging.tensorboard": "write workdir/events",
    "logging.wandb_project": "Weights & Biases, with the extra `wandb`",
    "logging.progress": "a line on the terminal",
    "logging.samples_every": "steps between samples of the model in training; 0: none",
    "logging.num_samples": "completions of each sampling",
    "algorithm.name": "the method",
    "algorithm.label_smoothing": "share of labels taken to be wrong",
    "algorithm.loss": "the loss on pairs",
    "algorithm.beta": "how strongly the policy is held to the reference",
    "algorithm.kl_coef": "weight of the KL penalty in the reward",
    "algorithm.kl_estimator": "of the KL in the reward; see methods",
    "algorithm.entropy_coef": "weight of the entropy bonus",
    "algorithm.gamma": "discount of a token",
    "algorithm.gae_lambda": "0 trusts the values alone, 1 the rewards alone",
    "algorithm.clip_range": "of the probability ratio",
    "algorithm.value_clip_range": "of the value's move, in units of value",
    "algorithm.vf_coef": "weight of the value loss",
    "algorithm.num_ppo_epochs": "passes over an iteration's experience",
    "algorithm.num_minibatches": "updates in each pass",
    "algorithm.whiten_advantages": "advantages to mean 0 and variance 1 over the iteration's tokens",
    "rewards.scale": "factor of the scores",
    "rollout.max_new_tokens": "tokens of a sampled completion",
    "rollout.temperature": "of the samples; ppo's log-probs are at the same temperature",
    "model.dtype": "of the computation",
    "optimizer.name": "the optimizer",
    "optimizer.max_grad_norm": "gradients are clipped to this norm, by role; 0: no clipping",
    "optimizer.final_fraction": "share of the learning rate at the end of linear and cosine",
    "model.tokenizer": "a directory or hub id; default: that of model.path",
    "model.chat_template": "a file or a template; default: the tokenizer's own",
    "model.attention": "the backend; default: what suits the platform",
    "model.remat": "what the backward pass keeps: all, matrix products (dots; offload: in host memory), layer inputs",
    "rollout.top_k": "samples among the k likeliest tokens; 0: off",
    "rollout.top_p": "samples among the likeliest tokens that make up this share; 1: off",
    "checkpoint.every": "steps between checkpoints; 0: at the end only",
    "checkpoint.resume": "False: never; whole: from the newest that is not damaged; reward: though the reward changed",
    "data.max_length": "tokens of prompt + completion; default: 1,024, or what the models were made for, if less",
    "data.row_length": "tokens of a row; default: what the data needs, at most max_length (pairs: twice that)",
    "data.append_eos": "adds EOS to a completion that lacks it and was not truncated",
    "data.cache_dir": "where tokenised records are kept; default: workdir/cache",
    "data.on_error": "at a row that is wrong; skip: it is counted by reason and left out",
    "data.system_turns": "fold: into the user's turn that follows; drop: left out",
    "data.train_on": "the assistant's turns (completion), its last, all with prompts, or roles: `assistant,tool`",
    "algorithm.reference_path": "the reference's directory or hub id; default: the policy's own start",
    "algorithm.value_path": "what the value model starts from; default: the reward model, or else the policy",
    "algorithm.kl_target": "set: kl_coef adapts towards this many nats a completion",
    "algorithm.average": "ipo: log-ratios averaged over tokens, as TRL does (none, true), or summed as in the paper",
    "rewards.clip": "scores are clipped to [-clip, clip] after scaling",
    "rewards.whiten": "whitens the tokens' rewards of an iteration; their mean is kept",
    "rewards.normalize": "divides scores by their running standard deviation, after subtracting their running mean",
}  # fmt: skip


def comments() -> list[tuple[str, frozenset[str], str]]:
    """(name, names beside it, comment) of each entry of a dict in the code, and of each assigned attribute's path."""
    found = []
    for name in _FILES:
        source = (ROOT / name).read_text()
        at, alone = {}, set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                at[token.start[0]] = token.string.lstrip("# ").strip()
                if not token.line[: token.start[1]].strip():
                    alone.add(token.start[0])

        def said(line: int, at=at, alone=alone) -> str:
            """The comment behind the line, or those right above it."""
            if line in at and line not in alone:
                return at[line]
            above = []
            while (line := line - 1) in alone:
                above.insert(0, at[line])
            return " ".join(above)

        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Dict):
                keys = [key for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
                beside = frozenset(key.value for key in keys)
                found += [(key.value, beside, said(key.lineno)) for key in keys]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                found.append((ast.unparse(node.targets[0]).partition(".")[2], frozenset(), said(node.lineno)))
    return [entry for entry in found if entry[2]]


def sentence(field: str, known: list[tuple[str, frozenset[str], str]]) -> str:
    """What a field is: its comment where its section is written down, or what `_SAID` says."""
    section, _, leaf = field.rpartition(".")
    if field in _SAID:
        return _SAID[field]
    best: tuple[int, str] = (0, "")
    for name, beside, text in known:
        if name == field and not beside:
            return text
        if name == leaf and beside:
            for algorithm in ALGORITHMS:
                node = get(defaults(algorithm), section) if section else defaults(algorithm)
                there = set(node or ())
                if leaf in there and beside <= there:
                    best = max(best, (len(beside), text))
    return best[1]


def shown(value) -> str:
    """A default as the tables have it."""
    if value in (None, ()):
        return "none"
    return f"`{value}`"


def default_of(field: str) -> str:
    """The default, algorithm by algorithm where they differ."""
    absent = object()
    by = {a: shown(v) for a in ALGORITHMS if (v := get(defaults(a), field, absent)) is not absent}
    values = dict.fromkeys(by.values())
    if field in REQUIRED:
        return "required"
    if field == "algorithm.name":
        return ", ".join(values)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{', '.join(a for a in by if by[a] == value)} {value}" for value in values)


def may_be(field: str) -> str:
    """Choices or bounds, and what guides give."""
    parts = []
    for name, choices in CHOICES:
        if name == field:
            parts.append(", ".join("none" if c is None else f"`{c}`" for c in choices))
    for name, low, high in BOUNDS:
        if name == field:
            parts.append(f"{_short(low)} to {_short(high)}")
    guides: dict[str, list[str]] = {}
    for algorithm, entry in ALGORITHMS.items():
        for name, low, high in entry.guides:
            if name == field:
                guides.setdefault(f"{low:g}" if low == high else f"{low:g} to {high:g}", []).append(algorithm)
    parts += [f"guides ({', '.join(names)}): {text}" for text, names in guides.items()]
    return "; ".join(parts)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def fields() -> str:
    """A table for each section."""
    names = list(dict.fromkeys(name for a in ALGORITHMS for name in leaves(defaults(a))))
    known = comments()
    sections = {section: [] for section in _ORDER}
    for name in names:
        sections[name.rpartition(".")[0]].append(name)
    lines = []
    for section, inside in sections.items():
        lines += [f"### {section or 'The run'}", "", "| field | default | may be | what it is |", "|---|---|---|---|"]
        for field in inside:
            of = [a for a in ALGORITHMS if get(defaults(a), field, lines) is not lines]
            only = "" if len(of) == len(ALGORITHMS) or section in ("rewards",) else f"{', '.join(of)}: "
            text = sentence(field, known).replace("|", "\\|")
            if not text:
                raise SystemExit(f"docs/fields.py: nothing says what {field} is: a comment where it is defined")
            lines.append(f"| `{field}` | {default_of(field)} | {may_be(field)} | {only}{text} |")
        lines.append("")
    return "\n".join(lines).rstrip()
