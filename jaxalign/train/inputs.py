"""Digests of what a run was made of (data, tokenizer, start weights, reward), compared at resume."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.config import get
from jaxalign.data.cache import digest
from jaxalign.data.files import is_url
from jaxalign.errors import InputError
from jaxalign.functions import is_name, module_file
from jaxalign.parallel.processes import first_problem, say
from jaxalign.ranges import ANOTHER_REWARD, FUNCTIONS
from jaxalign.train.models import revision_of
from jaxalign.train.stage import Stage

# Fields that name models, beside `model.path`.
_MODELS = ("algorithm.reference_path", "algorithm.value_path", "rewards.model")
_OF_THE_BASE = ("base_model_name_or_path", "revision")  # of an adapter_config.json
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")  # of a config.json

_HELD_OUT = "which records are held out of training (data.eval_fraction, data.eval_sources)"

# May change: nothing is trained on them, but figures before and after are of other records.
_EVALUATED = "the records of data.eval_sources"

# Consequences: where the first changed, the others did too, and are not listed.
_FOLLOWS = {
    "the records of data.sources": (_HELD_OUT, "the tokens of the training records"),
    _HELD_OUT: ("the tokens of the training records",),
    "the vocabulary of the tokenizer": ("the tokens of the training records", "the tokens that end a completion"),
    "the chat template": ("the tokens of the training records",),
}


def inputs_of(stage: Stage) -> dict[str, str]:
    """Digests of what a stage's numbers depend on beside its configuration, by what they are of.

    Data count by the records, the choice of those that are held out, and their tokens, masks and weights; the tokenizer
    by its vocabulary and template; a local model's weights by the names, types and shapes of all tensors and samples of
    each one's bytes (see `models.identity.identify`), one from the hub by its commit; a reward function by the file it
    is in, not by what that imports.

    Args:
      stage: data, models and compiled steps.
    """
    c, data = stage.config, stage.dataset
    found = {
        "the records of data.sources": data.records_digest,
        _HELD_OUT: digest(data.selection.tobytes()),
        "the vocabulary of the tokenizer": digest(stage.tokenizer.get_vocab()),
        "the chat template": digest(getattr(stage.tokenizer, "chat_template", None)),
        "the tokens that end a completion": digest(list(stage.stop_ids)),
        "the tokens of the training records": digest(*(data.keys("digest").tobytes(), *_arrays(data.lengths()))),
    }
    if c.data.eval_sources:
        found[_EVALUATED] = stage.eval_dataset.records_digest
    found |= _model("model.path", c.model.path, c.model.revision, c.model.from_scratch)
    for field in _MODELS:
        if path := get(c, field):
            found |= _model(field, path, revision_of(path, c), c.model.from_scratch and path == c.model.path)
    if name := get(c, "rewards.function"):
        file = Path(module_file(name)).expanduser()
        found["the file of rewards.function"] = _content(file)
    for field in FUNCTIONS:
        if is_name(own := get(c, field)):
            found[f"the file of {field}"] = _content(Path(module_file(own)).expanduser())
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The inputs that changed, in words.

    >>> changed({"the chat template": "a", "the tokens of the training records": "b"}, {"the chat template": "c"})
    ['the chat template']
    """
    wrong = [name for name in before if name in now and before[name] != now[name]]
    told = {name for first in wrong for name in _FOLLOWS.get(first, ())}
    return [name for name in wrong if name not in told]


def check_past(stage: Stage, start: int, meta: Mapping[str, Any], inputs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Refuses to resume a run that has other inputs now, or that is longer than it is to be.

    Args:
      stage: data, models and compiled steps.
      start: batches done.
      meta: of the checkpoint.
      inputs: digests by what they are of, see `inputs_of`.

    Returns:
      The changes that `checkpoint.resume=reward` has let pass, each with its step, the run's earlier ones too.

    Raises:
      InputError: what changed, and the two ways on; the directory is as it was.
    """
    where = stage.directory.path
    if start > stage.num_steps:
        raise InputError(
            f"{where} holds a run of {start} steps, and {stage.num_steps} are asked for",
            f"at least {start}: what was learned stays learned",
            f"--config.num_train_steps={start}, or --config.workdir=ANOTHER",
        )
    if not start and (where / "DONE").exists():
        raise InputError(
            f"{where} holds a finished run without a checkpoint to resume from",
            "its last checkpoint, to make it longer",
            "the length that it had, or --config.workdir=ANOTHER",
        )
    before = meta.get("inputs")
    if start and before is None:
        say(f"warning: checkpoint {start} does not say what it was made of (an earlier version's): not compared")
    learned = dict(before or {})
    evaluated = learned.pop(_EVALUATED, None)
    if evaluated and evaluated != inputs.get(_EVALUATED, evaluated):
        say(
            f"warning: {_EVALUATED} are not those of checkpoint {start}: eval/ figures before and after it do not "
            "compare, nor does the best by them"
        )
    wrong, known = changed(learned, inputs), list(meta.get("changes", ()))
    problem = first_problem(", ".join(wrong))
    if not problem:
        return known
    fix = "put it back to resume, or begin anew with --config.workdir=ANOTHER"
    if not first_problem(", ".join(name for name in wrong if " of rewards." not in name)):
        if stage.config.checkpoint.resume == ANOTHER_REWARD:
            say(f"warning: from step {start} on there is another reward: {problem} changed; figures do not compare")
            return [*known, {"step": start, "changed": problem}]
        fix += f"; --config.checkpoint.resume={ANOTHER_REWARD} resumes with another reward, and notes so"
    raise InputError(
        f"since checkpoint {start} of {where} there is a change in {problem}", "what the run was begun with", fix
    )


def _arrays(lengths: Mapping[str, Any]) -> list[bytes]:
    return [lengths[name].tobytes() for name in sorted(lengths)]


def _model(field: str, path: str, revision: str | None, scratch: bool) -> dict[str, str]:
    from jaxalign.models.hub import (
        ADAPTER_CONFIG,
        CONFIG,
        TOKENIZER_FILES,
        base_of,
        file_of,
        is_adapter_dir,
        locate,
        read_json,
    )
    from jaxalign.models.identity import identify

    local = Path(path).expanduser().is_dir()
    directory = locate(path, revision, weights=is_url(path) and not scratch)
    config = {k: v for k, v in read_json(file_of(directory, CONFIG)).items() if k not in _VOLATILE}
    found = {f"the config.json of {field}": digest(config)}
    if is_adapter_dir(directory):  # its base may have moved: that counts by its weights
        told = {k: v for k, v in read_json(directory / ADAPTER_CONFIG).items() if k not in _OF_THE_BASE}
        found[f"the {ADAPTER_CONFIG} of {field}"] = digest(told)
    if not local and not is_url(path):
        base = {f"the base of {field}": base_of(directory, weights=False).name} if is_adapter_dir(directory) else {}
        return {f"the commit of {field}": directory.name} | base
    if not scratch:
        try:
            found[f"the weights of {field}"] = identify(directory)
        except InputError:  # they are gone: never equal to a digest
            found[f"the weights of {field}"] = "none"
    if field == "rewards.model":  # its text goes through a tokenizer of its own
        found[f"the tokenizer of {field}"] = digest({name: _content(directory / name) for name in TOKENIZER_FILES})
    return found


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if os.path.isfile(file) else "none"
