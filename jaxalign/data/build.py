"""Builds the dataset of a run: sources to records, to tokens in a cache, to examples of a split."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.config import max_length
from jaxalign.data.cache import TokenStore, digest, digest_records, digest_tokenizer, open_or_write
from jaxalign.data.dataset import NEEDS, Dataset
from jaxalign.data.dialogues import render_plain
from jaxalign.data.forms import slots
from jaxalign.data.limits import Limits
from jaxalign.data.mixture import load_records
from jaxalign.data.omissions import with_system_turns
from jaxalign.data.records import Notes, Record, check_skipped
from jaxalign.data.report import data_report
from jaxalign.data.rows import segment_tokens
from jaxalign.data.split import held_out
from jaxalign.data.thoughts import KEYS
from jaxalign.data.tokenize import (
    LOST,
    NUM_REWRITTEN,
    OTHER_START,
    REWRITTEN,
    Dropped,
    Encoder,
    Example,
    tokenize_records,
)
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS, Reads

_SKIPPED = "skipped: "  # prefix in counts: records that cannot be rendered, by reason


def build(
    config,
    tokenizer,
    split: str = "train",
    *,
    eos_ids: Sequence[int] = (),
    like: Dataset | None = None,
) -> Dataset | None:
    """Reads, tokenises (or finds in the cache) and lays out the data of a stage.

    Args:
      config: a stage's configuration.
      tokenizer: a `transformers` tokenizer with its chat template in place.
      split: "train", or "eval": eval_sources where given, else the share eval_fraction of the records, which
        "train" then leaves out.
      eos_ids: ids beside the tokenizer's own that end a completion.
      like: the training dataset, for "eval": its batch shape is taken where the data fits it, so that nothing
        is compiled anew, and the report counts what both hold.

    Returns:
      The dataset; None for "eval" where the configuration has none.

    Raises:
      InputError: for sources, columns, records or limits that leave nothing to train on.
    """
    data = config.data
    if split == "eval" and not data.eval_sources and not data.eval_fraction:
        return None
    own_sources = split == "eval" and bool(data.eval_sources)
    sources = data.eval_sources if own_sources else data.sources
    records, tally = load_records(
        sources,
        ALGORITHMS[config.algorithm.name].reads,
        seed=config.seed,
        max_records=None if own_sources else data.max_records,
        field="data.eval_sources" if own_sources else "data.sources",
        on_error=data.on_error,
        max_skipped=data.max_skipped,
        directory=_cache_dir(config),
    )
    return from_records(records, config, tokenizer, split, eos_ids=eos_ids, like=like, tally=tally.to_dict())


def from_records(
    records: Sequence[Record],
    config,
    tokenizer,
    split: str = "train",
    *,
    eos_ids: Sequence[int] = (),
    like: Dataset | None = None,
    tally: dict[str, Any] | None = None,
) -> Dataset:
    """Builds a dataset from records instead of sources; see `build`.

    Raises:
      InputError: a record of a form that the algorithm does not read; else as `build`.
    """
    data, reads = config.data, ALGORITHMS[config.algorithm.name].reads
    encoder = Encoder(tokenizer, eos_ids, render_plain)
    limits = _limits(config, reads, encoder)
    options = {
        "train_on": data.get("train_on", "completion"),
        "train_on_eos": data.get("train_on_eos", "turn"),
        "append_eos": bool(data.get("append_eos", False)),
        "on_error": data.on_error,
    }
    shared_prompt = bool(data.get("shared_prompt", True))
    row_length = None if reads.readout == "none" else data.row_length  # prompts to sample from have no fixed length
    max_row_length = row_length or limits.max_length * max(len(slots(reads)), 1)

    def examples(counts: Notes) -> Iterator[tuple[Record, Example]]:
        used, ahead = tee(_with_system_turns(records, data.system_turns))
        made = tokenize_records(ahead, encoder, **options, notes=counts)
        for record, example in zip(used, made, strict=True):
            result = example if isinstance(example, Dropped) else limits.apply(example, counts)
            if not isinstance(result, Dropped):
                lengths: list[np.ndarray | int] = [len(c) for c in result.completions]
                needed = segment_tokens(len(result.prompt), lengths, shared_prompt)
                if needed > max_row_length:
                    result = Dropped(record.index, "longer than row_length", (("row_length", int(needed)),))
            if isinstance(result, Dropped) and result.wrong:
                counts.add(_SKIPPED + result.reason, record)
            elif isinstance(result, Dropped):
                counts[f"dropped: {result.reason}"] += 1
                for field, length in result.needs:
                    counts[NEEDS + field] = max(counts[NEEDS + field], length)
            else:
                yield record, result

    plain = 0  # dialogues rendered without a chat template

    def checked() -> Iterator[Record]:
        nonlocal plain
        for record in _with_system_turns(records, data.system_turns):
            _check_form(record, reads)
            plain += encoder.template.is_plain and _is_dialogue(record)
            yield record

    content, sources = digest_records(checked())
    key = digest(
        config.algorithm.name,  # tokens do not depend on it; kept so that existing caches stay valid
        [content, sources],
        digest_tokenizer(tokenizer, encoder.prefix, encoder.eos_ids),
        limits,
        options,
        [shared_prompt, max_row_length],
    )
    store = open_or_write(_cache_dir(config), key, examples)
    tally = _completed(tally or {"read": len(records), "dropped": {}}, store, encoder)
    check_skipped(
        {name.removeprefix(_SKIPPED): n for name, n in store.meta["counts"].items() if name.startswith(_SKIPPED)},
        len(records),
        data.max_skipped,
        "data.sources",
        tally["examples"],
    )
    if not len(store):
        raise _nothing_left(len(records), store.meta["counts"], config)
    fraction = 0.0 if data.eval_sources else data.eval_fraction
    selection = held_out(store.table["group"], fraction, config.seed, split)
    dataset = Dataset(
        store,
        selection,
        reads=reads,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=bool(data.shuffle) and split == "train",
        packed=bool(data.packing),
        shared_prompt=shared_prompt,
        row_length=row_length,
        max_row_length=max_row_length,
        pad_id=_pad_id(tokenizer),
        like=like,
    )
    dataset.records_digest = content
    train = like if split == "eval" else None
    dataset.report = data_report(dataset, tally, train, plain)
    return dataset


def _with_system_turns(records: Iterable[Record], how: str) -> Iterator[Record]:
    """Records whose system turns are kept, folded into the user's or dropped, as `data.system_turns` says."""
    fields = ("messages", "prompt", "completion", "chosen", "rejected")
    for record in records:
        if how == "keep":
            yield record
            continue
        lists = {name: value for name in fields if isinstance(value := getattr(record, name), list)}
        parts: dict[str, Any] = {name: with_system_turns(value, how) for name, value in lists.items()}
        yield record._replace(**parts)


def _completed(tally: dict[str, Any], store: TokenStore, encoder: Encoder) -> dict[str, Any]:
    """Adds what tokenisation found to the sources' tally: records skipped, text left out, split markers, damage."""
    counts, places = store.meta["counts"], store.meta["places"]
    named = {name: n for name, n in counts.items() if name.startswith((_SKIPPED, LOST))}
    skipped = {name.removeprefix(_SKIPPED): n for name, n in named.items() if name.startswith(_SKIPPED)}
    lost = {name.removeprefix(LOST): n for name, n in named.items() if name.startswith(LOST)}
    examples = {name.removeprefix(_SKIPPED).removeprefix(LOST): found for name, found in places.items()}
    warnings = list(tally.get("warnings", ()))
    if store.damage:
        warnings.append(f"the cache of tokens in {store.directory} was damaged ({store.damage}) and is made again")
    if "reasoning" in lost and not encoder.template.thoughts_keys:
        warnings.append(
            f"messages hold thoughts, and the chat template reads none of {', '.join(KEYS)}: they are learned in the"
            " content, as <think>...</think> before the answer, or by a template that reads them"
            " (--config.model.chat_template=FILE.jinja)"
        )
    return {
        **tally,
        "rewritten": {"records": counts.get(REWRITTEN, 0), "answers": counts.get(NUM_REWRITTEN, 0)},
        "other_start": counts.get(OTHER_START, 0),
        "skipped": {**tally.get("skipped", {}), **skipped},
        "examples": {**tally.get("examples", {}), **examples},
        "warnings": warnings,
        "lost": lost,
        "markers": encoder.template.split_markers() if any(map(_is_dialogue, store.sample())) else {},
    }


def _is_dialogue(record: Record) -> bool:
    """Whether a record needs a template: one of its fields is a list of messages."""
    return isinstance(record.messages, list) or isinstance(record.prompt, list)


def _check_form(record: Record, reads: Reads) -> None:
    if record.form not in reads.forms:
        raise InputError(
            f"record {record.index} ({record.source}:{record.line}) is of the form {record.form!r}",
            f"one of {', '.join(reads.forms)}",
            "records that `load_records` has read for this algorithm",
        )


def _sampled(config, reads: Reads) -> int:
    """Tokens to sample after a prompt, which `data.max_length` includes."""
    return config.rollout.max_new_tokens if reads.readout == "none" else 0


def _limits(config, reads: Reads, encoder: Encoder) -> Limits:
    data, room = config.data, max_length(config) - _sampled(config, reads)
    return Limits(room, data.max_prompt_length, data.get("max_completion_length"), data.truncation, encoder.bos_id)


def _cache_dir(config) -> Path:
    chosen = config.data.cache_dir or (config.workdir and os.path.join(config.workdir, "cache"))
    if not chosen or "://" in chosen:  # memory maps need a local file
        return Path(tempfile.gettempdir()) / f"jaxalign-cache-{os.getuid()}"
    return Path(chosen)


def _pad_id(tokenizer) -> int:
    chosen = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in chosen if i is not None)


def _nothing_left(num_records: int, counts: dict[str, int], config) -> InputError:
    data, prefix = config.data, "dropped: "
    dropped = {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}
    reasons = ", ".join(f"{reason} ({n})" for reason, n in sorted(dropped.items(), key=lambda item: -item[1]))
    needs = {name.removeprefix(NEEDS): n for name, n in counts.items() if name.startswith(NEEDS)}
    if "max_length" in needs:
        needs["max_length"] += _sampled(config, ALGORITHMS[config.algorithm.name].reads)
    fix = " ".join(f"--config.data.{field}={length}" for field, length in needs.items())
    if fix and data.truncation == "drop":
        fix += " or --config.data.truncation=keep_start"
    return InputError(
        f"no usable record among {num_records}: {reasons or 'the sources are empty'}",
        "at least one",
        fix or "other records in the files of data.sources, or columns that hold what is to be learned",
    )
