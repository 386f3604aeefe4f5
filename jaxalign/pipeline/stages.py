"""Running a configuration: one stage, or several in order, each only where its result is not there yet.

A stage's key is a hash of its configuration, of the files it names and of the keys of the stages it takes its
inputs from.  A finished stage with the same key is skipped, an unfinished one with the same key is resumed by the
trainer, and one with another key is moved aside to `<stage>.old-<n>` before the stage runs anew: nothing is deleted.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config import Validated, get, to_dict, validated
from jaxalign.errors import InputError
from jaxalign.pipeline.keys import keys_of
from jaxalign.pipeline.stagedir import RECORD as RECORD
from jaxalign.pipeline.stagedir import SKIP, PlannedStage, changed, is_done, note, path_of, prepare, remember
from jaxalign.ranges import bounds, misfit, shown
from jaxalign.registry import ALGORITHMS

# (role in `from`, the field it fills, the role that a stage must train to be named)
_FROM = (
    ("model", "model.path", "policy"),
    ("reward", "rewards.model", "reward"),
)


def plan(config: ConfigDict | Validated) -> list[PlannedStage]:
    """Resolves and validates every stage before the first one runs.

    Args:
      config: a tree from `jaxalign.config.defaults` or `jaxalign.config.stages`; a validated one is not checked again.

    Returns:
      The stages in order.

    Raises:
      InputError: a stage that does not exist, that takes its input from a later one or from one of the wrong kind,
        or a stage's own configuration; the stage is named.
    """
    if isinstance(config, Validated) or "stages" not in config:
        checked = _alone(config)  # before the key is made: a section may be none
        keys = keys_of(checked.config, {}, ())
        return [PlannedStage("", checked, keys.key, {}, keys)]
    names = _names(config)
    if expected := misfit(config.get("seed"), *bounds("seed"), whole=True):
        raise InputError(f"seed is {shown(config.get('seed'))}", expected, "--config.seed=0")
    if not isinstance(config.get("workdir"), str) or not config.workdir.strip():
        raise InputError("workdir is not set", "a directory for the results", "--config.workdir=runs/NAME")
    done: dict[str, PlannedStage] = {}
    for name in names:
        stage = config[name].copy_and_resolve_references()
        with stage.unlocked():
            stage.workdir = os.path.join(config.workdir, name)
            own, stage.seed = stage.get("seed"), config.seed
        inputs = _resolve(name, stage, done, names)
        try:
            checked = validated(stage)
        except InputError as error:
            raise _in_stage(name, error) from None
        if own not in (0, config.seed):  # 0: as it is by default
            told = f"its own seed {shown(own)} is not read: the stages share one, {config.seed}"
            checked = checked._replace(warnings=(*checked.warnings, told))
        filled = tuple(field for role, field, _ in _FROM if role in inputs)
        keys = keys_of(stage, {role: done[source].key for role, source in inputs.items()}, filled)
        done[name] = PlannedStage(name, checked, keys.key, inputs, keys)
    return list(done.values())


def run(config: ConfigDict | Validated, *, dry_run: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a configuration's stages in order, skipping those whose result is there.

    Args:
      config: a tree from `jaxalign.config.defaults` or `jaxalign.config.stages`; a validated one is not checked again.
      dry_run: report data, rows and memory of every stage, train nothing, write nothing but caches.
      log: receives a line of text about each stage.

    Returns:
      The trainer's result; with stages, one for each stage by its name.

    Raises:
      InputError: before the first stage runs, whichever stage it concerns, or where another run is at work.
    """
    from jaxalign.ops.precision import require_dtypes
    from jaxalign.parallel.processes import is_main, on_main  # jax from here on
    from jaxalign.parallel.startup import start
    from jaxalign.train.lock import exclusive
    from jaxalign.train.rundir import results

    stages = plan(config)
    check_inputs(stages)
    for stage in stages:  # of a later one too, before the first one runs
        model = stage.config.model
        try:
            require_dtypes(dtype=model.dtype, param_dtype=model.param_dtype, frozen_dtype=model.frozen_dtype)
        except InputError as error:
            raise _in_stage(stage.name, error) from None
    start(stages[0].config.process_timeout)
    say = log if is_main() else _silent
    for stage in stages:
        for warning in stage.checked.warnings:
            say(f"warning: {stage.name + ': ' if stage.name else ''}{warning}")
    if not stages[0].name:
        if dry_run:
            return _dry(stages, say)[""]
        before = results(path_of(stages[0].config.workdir))
        result = _train(stages[0])
        _report(stages[0], result, say, again=result == before)
        if result != before:
            on_main(functools.partial(remember, stages[0]))
        elif other := changed(stages[0], before):
            say(f"warning: {other} changed since this run was done, which learned from what was there then")
        return result
    assert isinstance(config, ConfigDict)
    with exclusive(path_of(config.workdir)):
        return _dry(stages, say) if dry_run else _in_order(stages, say)


def _in_order(stages: list[PlannedStage], say: Callable[[str], None]) -> dict[str, Any]:
    """Runs what is not done yet; the results by stage."""
    from jaxalign.parallel.processes import on_main

    results: dict[str, Any] = {}
    for stage in stages:
        action = on_main(functools.partial(prepare, stage, say))
        if action == SKIP:
            results[stage.name] = {"skipped": True, "workdir": stage.config.workdir}
            continue
        results[stage.name] = _train(stage)
        on_main(functools.partial(note, stage))  # it may be longer now than it was
        if not on_main(functools.partial(is_done, stage.config.workdir)):  # process 0 wrote it; others may be early
            say(f"stage {stage.name} stopped before its end; the same command resumes it")
            break
        _report(stage, results[stage.name], say)
        _release()
    return results


def _alone(config: ConfigDict | Validated) -> Validated:
    """A configuration without stages, validated; inputs from other stages are refused, as there are none."""
    checked = config if isinstance(config, Validated) else None
    config = config if checked is None else checked.config
    for role, field, _ in _FROM:
        if source := get(config, f"from.{role}"):
            raise InputError(
                f"from.{role} is {source!r} in a configuration without stages",
                f"None: from names an earlier stage of stages(...); {field} takes a directory",
                f"--config.from.{role}=None --config.{field}=WORKDIR/export of {source!r}",
            )
    return validated(config) if checked is None else checked


def _names(config: ConfigDict) -> tuple[str, ...]:
    names = config.stages
    sections = [k for k in config if isinstance(config[k], ConfigDict)]
    if not sections:
        raise InputError(
            "a configuration of stages without one", "sections", "stages('runs/NAME', sft=defaults('sft'))"
        )
    if not isinstance(names, (tuple, list)):
        raise InputError(f"stages is {names!r}", "a tuple of names", f"--config.stages={','.join(sections)}")
    if not names:
        raise InputError("stages is empty", f"names of stages: {', '.join(sections)}", f"--config.stages={sections[0]}")
    for name in names:
        if not isinstance(name, str) or name not in sections:
            raise InputError(
                f"stages holds {name!r}, which has no section",
                f"one of {', '.join(sections)}",
                f"c[{name!r}] = defaults(...)",
            )
        if not name.replace("_", "").replace("-", "").isalnum():
            raise InputError(
                f"a stage named {name!r}", "letters, digits, - and _: it names a directory", "another name"
            )
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(
            f"stages holds {twice!r} twice", "each stage once", f"--config.stages={','.join(dict.fromkeys(names))}"
        )
    return tuple(names)


def _resolve(name: str, stage: ConfigDict, done: dict[str, PlannedStage], names: tuple[str, ...]) -> dict[str, str]:
    """Fills in what `from` names and returns role -> stage."""
    inputs = {}
    for role, field, trained in _FROM:
        source = get(stage, f"from.{role}")
        if source is None:
            continue
        flag = f"--config.{name}.from.{role}"
        if source == name:
            raise InputError(f"stage {name}: from.{role} is {name!r} itself", "an earlier stage", f"{flag}=None")
        if source not in names:
            earlier = ", ".join(done) or "none: this is the first stage"
            raise InputError(f"stage {name}: from.{role} is {source!r}", f"an earlier stage ({earlier})", f"{flag}=...")
        if source not in done:
            order = ",".join([source, *(n for n in names if n != source)])
            raise InputError(
                f"stage {name}: from.{role} is {source!r}, which runs after it",
                "an earlier stage",
                f"--config.stages={order}",
            )
        given = done[source].config.algorithm.name
        if ALGORITHMS[given].trained != trained:
            algorithms = [name for name, algorithm in ALGORITHMS.items() if algorithm.trained == trained]
            raise InputError(
                f"stage {name}: from.{role} is {source!r}, a {given} stage",
                f"a stage of {' or '.join(algorithms)}",
                f"{flag}=...",
            )
        section, leaf = field.split(".")
        if not isinstance(stage.get(section), ConfigDict):
            raise InputError(
                f"stage {name}: from.{role} is {source!r}", f"None: {stage.algorithm.name} takes none", f"{flag}=None"
            )
        if stage[section][leaf] is not None:
            raise InputError(
                f"stage {name}: both from.{role} and {field} are set", "one of them", f"--config.{name}.{field}=None"
            )
        if role == "model" and stage.model.from_scratch:
            raise InputError(
                f"stage {name}: model.from_scratch with from.model",
                "weights from one place",
                f"--config.{name}.model.from_scratch=false",
            )
        stage[section][leaf] = os.path.join(done[source].config.workdir, "export")
        inputs[role] = source
    return inputs


def _in_stage(name: str, error: InputError) -> InputError:
    """A stage's error as its section's: all fields but `workdir` and `seed`, which the stages share."""
    if not name:
        return error
    return error.within(f"stage {name}", lambda field: field if field in ("workdir", "seed") else f"{name}.{field}")


def check_inputs(stages: list[PlannedStage]) -> None:
    """The first record of local data, the reward function and its signature of every stage, before the first starts.

    Args:
      stages: as `plan` gives them.

    Raises:
      InputError: the first that cannot be used; the stage is named.
    """
    from jaxalign.data.files import is_url
    from jaxalign.data.records import Tally
    from jaxalign.data.source import is_hub_id, parse_sources
    from jaxalign.data.sources import read
    from jaxalign.functions import load_function
    from jaxalign.rewards.function import FunctionScorer
    from jaxalign.train.named_functions import find_functions

    for stage in stages:
        try:
            for field in ("data.sources", "data.eval_sources"):
                for source in parse_sources(get(stage.config, field), field) if get(stage.config, field) else ():
                    if not is_url(source.path) and (os.path.exists(source.path) or not is_hub_id(source.path)):
                        next(iter(read(source, Tally(stage.config.data.on_error, field).bad)), None)
            find_functions(stage.config)
            if function := get(stage.config, "rewards.function"):
                FunctionScorer(load_function(function), function)
        except InputError as error:
            raise _in_stage(stage.name, error) from None


def _dry(stages: list[PlannedStage], say: Callable[[str], None]) -> dict[str, Any]:
    """A dry run of each stage; an input that is not trained yet is stood for by what it will start from."""
    results = {}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        with stage.config.unlocked():
            for role, field, _ in _FROM:
                section, leaf = field.split(".")
                source = stage.inputs.get(role)
                if source and not path_of(stage.config[section][leaf], "config.json").exists():
                    stage.config[section][leaf] = by_name[source].config.model.path
                    if section == "model":
                        stage.config.model.revision = by_name[source].config.model.revision
        if stage.name:
            say(f"stage {stage.name}:")
        else:
            _may_begin(stage.config)  # a changed stage among several is run anew, a run alone is refused
        results[stage.name] = _train(stage, dry_run=True)
        _release()
    if len(stages) > 1:  # those of the first ones have scrolled away
        for name, result in results.items():
            for warning in result.get("warnings", ()):
                say(f"warning: {name}: {warning}")
    return results


def _may_begin(config: ConfigDict) -> None:
    """Refuses, as training would, a directory that holds another run."""
    from jaxalign.train.models import fit_length
    from jaxalign.train.rundir import RunDir

    directory = RunDir(config.workdir)
    if directory.path.exists():
        directory.check(to_dict(fit_length(config)[0]), resume=config.checkpoint.resume)


def _train(stage: PlannedStage, *, dry_run: bool = False) -> dict[str, Any]:
    from jaxalign.train import trainer

    try:
        return trainer.run(stage.checked, dry_run=dry_run)
    except InputError as error:
        raise _in_stage(stage.name, error) from error


# Figures that a finished stage's line shows, where it has them, of training and of held-out data.
_TELLING = ("loss", "rewards/accuracies", "objective/scores", "objective/kl")


def _report(stage: PlannedStage, result: dict[str, Any], say: Callable[[str], None], *, again: bool = False) -> None:
    """What came out, in a line; `again` where it had come out before, and nothing was trained now."""
    figures = {**(result.get("metrics") or {}), **(result.get("eval") or {})}
    names = [f"{where}{name}" for name in _TELLING for where in ("", "eval/")]
    shown = "".join(f", {name} {figures[name]:.4g}" for name in names if figures.get(name) is not None)
    where = f" -> {result['export']}" if "export" in result else ""
    told = "done before, nothing was trained now (another --config.workdir trains anew)" if again else "done"
    say(f"{f'stage {stage.name}: ' if stage.name else ''}{told}{shown}{where}")


def _release() -> None:
    """Gives a finished stage's memory back: its arrays, and its compiled programs."""
    import jax

    gc.collect()
    jax.clear_caches()


def _silent(line: str) -> None:
    del line
