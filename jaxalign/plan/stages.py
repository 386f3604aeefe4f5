"""The stages of a configuration on a machine that need not be there: what is not here yet is stood for, and said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.config import get
from jaxalign.data.files import is_url
from jaxalign.data.source import is_hub_id
from jaxalign.errors import InputError
from jaxalign.models.config import read_hf
from jaxalign.models.hub import (
    CONFIG,
    DESCRIPTIONS,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    file_of,
    locate,
    tokenizer_home,
)
from jaxalign.models.text_part import text_fields
from jaxalign.parallel.mesh import make_mesh, mesh_shape
from jaxalign.plan.assumed import NO_DATA, AssumedData, absent
from jaxalign.train.minibatches import check_rows
from jaxalign.train.models import adapter_base, fit_length, revision_of, write_export
from jaxalign.train.rundir import RunDir
from jaxalign.train.stage import Stage, read_data

NO_REWARD_MODEL = "REWARD_MODEL/"  # in place of rewards.model, where no flag names any reward
_NO_REWARD = "jaxalign.plan.assumed:no_reward"


def stage_configs(config: Any) -> dict[str, Any]:
    """Each stage's own configuration by its name ("" for one alone), with what it starts from filled in.

    Args:
      config: a tree from `jaxalign.config.defaults` or `jaxalign.config.stages`, or a validated one.

    Raises:
      InputError: a stage's configuration, as training would refuse it.
    """
    from jaxalign.pipeline import stages

    found: dict[str, Any] = {}
    of_run = stages.plan(config)
    stages.check_inputs(of_run)
    for planned in of_run:
        c = planned.config.copy_and_resolve_references()
        with c.unlocked():
            source = planned.inputs.get("model")
            if source and not _there(c.model.path):
                given = found[source].model
                c.model.path, c.model.revision = given.path, given.revision
                c.model.tokenizer = c.model.tokenizer or given.tokenizer  # its export has a copy
                c.model.chat_template = c.model.chat_template or given.chat_template
        found[planned.name] = c.lock()
    return found


def starting_from(config: Any, exports: Mapping[str, str]) -> Any:
    """A stage's configuration that takes what earlier stages train from directories that stand for their exports.

    Args:
      config: one stage's, of `stage_configs`.
      exports: by stage.
    """
    c = config.copy_and_resolve_references()
    with c.unlocked():
        if directory := exports.get(get(c, "from.model")):
            c.model.path, c.model.revision = directory, None
        if directory := exports.get(get(c, "from.reward")):
            c.rewards.model = directory
    return c.lock()


def adapter_export(stage: Stage, workdir: str, directory: str) -> str | None:
    """Writes the adapter that a stage is to train, its numbers zeros; None where it trains none, or has done so.

    Args:
      stage: of `make_stage`.
      workdir: of the run, where the adapter may be already.
      directory: where.
    """
    c, role = stage.config, stage.program.trained[stage.program.exported]
    if adapter_base(role) is None or _there(os.path.join(workdir, "export")):
        return None
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), role.abstract())
    source = locate(c.model.path, c.model.revision, weights=False)
    return str(write_export(directory, role, zeros, dict, source=source, tokenizer=stage.tokenizer, dtype="bfloat16"))


def make_stage(
    config: Any, devices: list[Any], scratch: str, assumed: Mapping[str, float] | None = None
) -> tuple[Stage, list[str]]:
    """A stage whose steps can be compiled for devices that need not be there.

    Reads `config.json`, the tokenizer and data that are files here; no weights, and nothing from a hub's data sets.

    Args:
      config: one stage's, validated.
      devices: of the machine.
      scratch: a directory to work in.
      assumed: numbers by name: `readouts`, the share of the tokens of rows that are assumed which are read out.

    Returns:
      The stage, and a sentence about each thing that was stood for.

    Raises:
      InputError: a configuration, a mesh or a batch that cannot be, with the nearest that can.
    """
    c = config.copy_and_resolve_references()
    told: list[str] = []
    mesh = _mesh(c, devices)
    missing = absent(c)
    with _weights_are_not_needed(), c.unlocked():
        c.workdir = os.path.join(scratch, "run")
        _stand_in(c, scratch, told, columns=not missing)
        c, cut = fit_length(c)
    told += cut
    check_rows(c, mesh)

    def data(c: Any, tokenizer: Any, eos_ids: tuple[int, ...]) -> tuple[Any, Any]:
        held_out = bool(c.data.eval_fraction or c.data.eval_sources)
        if not missing:
            others = absent(c, "data.eval_sources") if c.data.eval_sources else []
            if not others:
                return read_data(c, tokenizer, eos_ids)
            told.append(f"data.eval_sources: {', '.join(others)} is not here: full rows are assumed")
            return _trained_on(c, tokenizer, eos_ids), AssumedData(c)
        dataset = AssumedData(c, (assumed or {}).get("readouts", 1.0))
        rows = f"full rows of {dataset.shape.length:,} tokens are assumed"
        told.append(f"no --data: {rows}" if missing == [NO_DATA] else f"data: {', '.join(missing)} is not here: {rows}")
        return dataset, AssumedData(c) if held_out else None

    with _weights_are_not_needed():
        # Built before the mesh is set: whatever is computed on the way must run on a device that is there.
        return Stage(c, mesh, RunDir(c.workdir), data=data), told


def _trained_on(c: Any, tokenizer: Any, eos_ids: tuple[int, ...]) -> Any:
    """The data to train on alone."""
    c = c.copy_and_resolve_references()
    with c.unlocked():
        c.data.eval_sources = ()
    return read_data(c, tokenizer, eos_ids)[0]


@contextlib.contextmanager
def _weights_are_not_needed() -> Iterator[None]:
    """Errors about models that are not here, with what a plan reads of them."""
    try:
        yield
    except InputError as error:
        fix = re.sub(r"hf download (\S+),", r'hf download \1 --include "*.json" (a plan reads no weights),', error.fix)
        made = ", or run the stage that writes it first"
        fix = fix.replace(made, " or a hub id of a model as large: config.json and the tokenizer are read, no weights")
        raise InputError(error.problem, error.expected, fix, error.places) from error


def _there(path: str | None) -> bool:
    if not path:
        return False
    return is_url(path) or any((Path(path).expanduser() / kind).exists() for kind in DESCRIPTIONS)


def _on_hub(path: str, revision: str | None) -> bool:
    """Whether a hub id's description is in the cache, or can be fetched."""
    if not is_hub_id(path) or os.path.isdir(path.split("/")[0]):
        return False
    try:
        return file_of(locate(path, revision, weights=False), CONFIG).exists()
    except InputError:
        return False


def _stand_in(c: Any, scratch: str, told: list[str], *, columns: bool) -> None:
    """Models that an earlier stage is to write, by what is as large; a reward function whose columns are not known."""
    if get(c, "rewards.function"):
        told.append("rewards.function runs on the host and is not counted")
        if not columns:
            c.rewards.function = _NO_REWARD
    for field, head in (("rewards.model", True), ("algorithm.value_path", True), ("algorithm.reference_path", False)):
        path = get(c, field)
        if not path or _there(path) or _on_hub(path, revision_of(path, c)):
            continue
        section, leaf = field.split(".")
        what = "no --reward: a reward model" if path == NO_REWARD_MODEL else f"{field}: {path} is not here: one"
        told.append(f"{what} as large as {c.model.path} is assumed")
        c[section][leaf] = _scorer_like(c, scratch) if head else c.model.path


def _scorer_like(c: Any, scratch: str) -> str:
    """A directory that describes a reward model of the policy's size."""
    from jaxalign.models import families

    source = locate(c.model.path, c.model.revision, weights=False)
    target = Path(scratch) / "reward"
    if not target.exists():
        target.mkdir(parents=True)
        tokens = locate(c.model.tokenizer, None, weights=False) if c.model.tokenizer else source
        files = [file_of(tokens, GENERATION_CONFIG), *(tokenizer_home(tokens) / name for name in TOKENIZER_FILES)]
        for file in files:  # the policy's own: its rows can be scored as they lie
            if file.exists():
                shutil.copy(file, target / file.name)
        fields = text_fields(read_hf(source))
        fields["architectures"] = [families.find(fields).architectures["score"]]
        (target / CONFIG).write_text(
            json.dumps(fields | {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}})
        )
    return str(target)


def _mesh(c: Any, devices: list[Any]) -> Mesh:
    """The mesh of the devices; one that does not divide them is refused with the nearest that does."""
    count = len(devices)
    try:
        mesh_shape(c.mesh, count)
        return make_mesh(c.mesh, devices)
    except InputError as error:
        sizes = {axis: int(c.mesh.get(axis, 1)) for axis in ("data", "tensor")}
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        tensor = max(t for t in range(1, max(sizes["tensor"], 1) + 1) if count // slices % t == 0)
        data = slices * max(
            n for n in range(1, max(sizes["data"] // slices, 1) + 1) if count // slices // tensor % n == 0
        )
        fix = f"--config.mesh.data={data} --config.mesh.fsdp=-1 --config.mesh.tensor={tensor}"
        raise InputError(error.problem, error.expected, fix, error.places) from None
