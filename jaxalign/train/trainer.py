"""One training stage from configuration to exported model."""

from __future__ import annotations

import functools
import os
import time
import warnings
from typing import Any

import jax

from jaxalign import config as configuration
from jaxalign.config import Validated, get, validated
from jaxalign.errors import InputError
from jaxalign.ops.precision import require_dtypes
from jaxalign.ops.trees import joined
from jaxalign.parallel import processes, startup
from jaxalign.parallel.device_memory import device_limit, num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.processes import say
from jaxalign.parallel.watch import watched
from jaxalign.rollout.layout import decoding_mesh
from jaxalign.train.best import Patience, check_best_metric, rarely
from jaxalign.train.card import model_card
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.compiled import memory_errors, peak_memory, reset_peak_memory
from jaxalign.train.dryrun import report
from jaxalign.train.flops import flops_per_token, peak_flops
from jaxalign.train.health import Health
from jaxalign.train.inputs import check_past, inputs_of
from jaxalign.train.lock import exclusive
from jaxalign.train.loop import Loop, make_evaluate
from jaxalign.train.metrics import Writer, read_metrics
from jaxalign.train.minibatches import check_rows
from jaxalign.train.models import adapter_base, bytes_by_role, fit_length, tokenizer_of_export, write_export
from jaxalign.train.named_functions import check_functions, load_callbacks
from jaxalign.train.remat import noted, settle_remat
from jaxalign.train.room import against_saving, check_room
from jaxalign.train.rundir import RunDir, beside, require_shared
from jaxalign.train.schedule_free import evaluated
from jaxalign.train.stage import Stage, stage_warnings
from jaxalign.train.trackers import check_trackers
from jaxalign.types import TrainState


def run(config: Any, *, dry_run: bool = False, devices: Any = None) -> dict[str, Any]:
    """Trains one stage, or resumes one that was stopped, and exports its model to `workdir/export`.

    Args:
      config: a tree made from `jaxalign.config.defaults`, or a validated one, whose warnings have been printed.
      dry_run: parse, report the data, show three rows with their masks, compile and estimate memory; train nothing.
      devices: those of the mesh; all by default.

    Returns:
      `steps`, `metrics` (last training step), `eval`, `wall_seconds`, `tokens_per_second`, `peak_memory_bytes`,
      `step_memory` (bytes by the compiler's account), `model_bytes` by role, `num_compiles` of the train step,
      `export`, `warnings` (sentences about what went wrong); the same is written to `DONE`, and returned at
      once when the stage is done already.

    Raises:
      InputError: anything in configuration, data or learning that the user can change, or another run that is at work
        in the same directory.
      Interrupted: asked to stop; the state is saved and the same call resumes.
    """
    started = time.monotonic()
    reset_peak_memory()
    checked = config if isinstance(config, Validated) else validated(config)
    told, config = () if checked is config else checked.warnings, checked.config
    require_dtypes(**{name: config.model[name] for name in ("dtype", "param_dtype", "frozen_dtype")})
    check_trackers(config.logging.trackers)
    config, of_lengths = fit_length(config)
    cut = [said for said in of_lengths if said not in checked.warnings]
    for warning in (*told, *cut):
        warnings.warn(warning, stacklevel=2)
    startup.start(config.process_timeout)
    check_functions(config)
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    if get(config, "rollout.tensor"):
        decoding_mesh(mesh, config.rollout.tensor)  # or it is refused
    directory = RunDir(config.workdir)
    directory.make()
    with directory.left_if_refused(), watched(config.process_timeout), exclusive(directory.path) as lock:
        if not dry_run:
            require_shared(directory)
            done = directory.open(configuration.to_dict(config), resume=config.checkpoint.resume)
            if done is not None:
                if lost := directory.lost_export():
                    say(f"warning: {lost}")
                return done
        processes.on_main(functools.partial(_check_export, directory))
        with jax.set_mesh(mesh):
            stage = Stage(config, mesh, directory, lock)
            stage.check_weights()
            if dry_run:
                settle_remat(stage, device_limit())
                return report(stage, [*checked.warnings, *cut])
            with memory_errors(f"{config.algorithm.name} stage"):
                results = _train(stage)
        results |= {"wall_seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
        directory.write_json("DONE", results)
    return results


def _train(stage: Stage) -> dict[str, Any]:
    """Trains to the end and exports; returns the results."""
    c, program = stage.config, stage.program
    check_best_metric(stage)
    for sentence in [*rarely(stage), *stage_warnings(stage)]:
        say(f"warning: {sentence}")
    checkpoints = Checkpoints(
        stage.directory.checkpoints,
        keep=c.checkpoint.keep,
        best_metric=c.checkpoint.best_metric,
        best_mode=c.checkpoint.best_mode,
    )
    found = checkpoints.resume(stage.like, whole=c.checkpoint.resume == "whole")
    start = found[0] if found else 0
    if stage.directory.begun and not found:
        say(f"{c.algorithm.name}: no checkpoint was saved here: training begins anew")
    inputs = inputs_of(stage)
    changes = check_past(stage, start, found[2] if found else {}, inputs)
    if start < stage.num_steps:
        for sentence in check_room(stage, len(checkpoints.steps())):
            say(f"warning: {sentence}")
        settle_remat(stage, device_limit(), stage.directory.settled if found else None)
        stage.directory.settled = noted(stage) if stage.remat else {}
    stage.directory.begin(configuration.to_dict(c))
    stage.write_report()
    state = found[1] if found else stage.start()
    dataset, eval_dataset = stage.dataset, stage.eval_dataset
    if program.reference is not None:
        from jaxalign.train.reference import attach

        dataset, eval_dataset = attach(stage, [dataset, eval_dataset])
    frozen = stage.frozen()
    writer = Writer(stage.directory, c.logging, start=start, config=configuration.to_dict(c))
    past = read_metrics(stage.directory)
    loop = Loop(
        name=c.algorithm.name,
        config=c,
        mesh=stage.mesh,
        frozen=frozen,
        step=stage.step,
        prepare=program.prepare,
        dataset=dataset,
        num_steps=stage.num_steps,
        checkpoints=checkpoints,
        writer=writer,
        health=Health(past, beta=c.algorithm.get("beta")),
        evaluate=_evaluate(stage, frozen, eval_dataset),
        sample=_sampler(stage),
        seconds_per_token=_seconds_per_token(stage),
        meta={
            "config": configuration.to_dict(c),
            "mesh": dict(stage.mesh.shape),
            "algorithm": c.algorithm.name,
            "inputs": inputs,
            "changes": changes,
        },
        directory=stage.directory,
        patience=Patience(c, (row for row in past if row["step"] <= start)),  # process 0 may still cut the file
        callbacks=load_callbacks(c.callbacks),
        lock=stage.lock,
        offload=stage.offload,
        against_saving=lambda: against_saving(stage, len(checkpoints.steps())),
    )
    try:
        state, results = loop.run(state, start)
        checkpoints.wait()
    finally:
        try:
            writer.close()
        finally:
            checkpoints.close()
    if start == results["steps"]:  # training had finished before: only the export was missing
        results |= last_figures(read_metrics(stage.directory))
    results["export"] = _export(stage, state, checkpoints, frozen, results["steps"], inputs)
    results |= {
        "num_compiles": stage.step.num_compiles,
        "step_memory": stage.step.memory,
        "model_bytes": bytes_by_role(state.params, frozen),
        "optimizer_bytes": num_bytes(state.opt),
    }
    return results


def _evaluate(stage: Stage, frozen, dataset):
    if dataset is None:
        return None
    count = min(stage.config.eval.num_batches or dataset.batches_per_epoch, dataset.batches_per_epoch)
    if stage.program.evaluate is not None:
        measure = functools.partial(stage.program.evaluate, records=dataset.record)
        whole = lambda state: state._replace(params=joined(state.params, frozen))  # noqa: E731
        step = lambda state, frozen, batch: measure(whole(state), frozen, batch)  # noqa: E731
    else:
        step = lambda state, frozen, batch: stage.eval_step(state.params, frozen, state.extra, batch)  # noqa: E731
    return make_evaluate(step, frozen, dataset, count, stage.mesh)


def _sampler(stage: Stage):
    if not stage.config.logging.get("samples_every", 0):
        return None
    from jaxalign.train.samples import Sampler

    return Sampler(stage)


def _seconds_per_token(stage: Stage) -> float | None:
    """Device seconds per token at the hardware's peak; None where the peak is not known."""
    peak = peak_flops(jax.local_devices()[0].device_kind)
    if peak is None:
        return None
    length = stage.dataset.shape[1]
    flops = sum(
        flops_per_token(role.model.config, length, passes=stage.program.passes)
        for role in stage.program.trained.values()
    )
    return flops / (peak * stage.mesh.size)


def _export(
    stage, state: TrainState, checkpoints: Checkpoints, frozen: dict[str, Any], step: int, inputs: dict[str, str]
) -> str:
    """Exports the best checkpoint where there is a metric, else the last, in Hugging Face format."""
    from jaxalign.models.export import only_here
    from jaxalign.models.hub import locate

    c, role = stage.config, stage.program.exported
    best = checkpoints.best()
    if c.checkpoint.best_metric and best != step:
        state, step = checkpoints.restore(best, stage.like)[0], best
    target = os.fspath(stage.directory.export)
    source = locate(c.model.path, c.model.revision, weights=False)
    trained = stage.program.trained[role]
    note, base = only_here(trained.model.config), adapter_base(trained)
    write_export(
        target,
        trained,
        evaluated(state).params[role],
        lambda: frozen.get(role, {}),
        source=source,
        tokenizer=tokenizer_of_export(c, source, stage.tokenizer),
        card=model_card(stage.directory, configuration.to_dict(c), step, inputs, note, base),
    )
    return target


def last_figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The `metrics` and `eval` of a run's results, from its `metrics.jsonl`."""
    figures = [{k: v for k, v in row.items() if k not in ("step", "time")} for row in rows]
    train = [row for row in figures if any(k == "loss" or k.startswith("loss/") for k in row)]
    held_out = [row for row in figures if any(k.startswith("eval/") for k in row)]
    return {"metrics": train[-1] if train else {}, "eval": held_out[-1] if held_out else {}}


def _check_export(directory: RunDir) -> None:
    """Refuses, before training, an `export/` that the end of the run could not replace."""
    from jaxalign.models.export import check_target

    try:
        check_target(directory.export)
    except InputError as error:
        fix = f"mv {directory.export} ELSEWHERE, or --config.workdir={beside(directory.path)}"
        raise InputError(error.found, error.expected, fix) from error
    if not directory.remote and os.path.ismount(directory.export):
        raise InputError(
            f"{directory.export} is a mount point, which the export cannot take the place of",
            "a workdir whose export/ is a directory of its own, or not there yet",
            f"--config.workdir={directory.export / 'run'}",
        )
