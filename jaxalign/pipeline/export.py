"""A run's checkpoint as a Hugging Face directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jaxalign.config import defaults
from jaxalign.errors import InputError

FORMAT = 1  # of run directories that this version reads


def export(
    workdir: str, out: str, *, stage: str | None = None, checkpoint: str = "last", dtype: str | None = None
) -> Path | str:
    """Writes the model of a checkpoint, of a run that is done, stopped or still going.

    Only the model's own weights are read, not the optimizer's state, and nothing in `workdir` is touched.

    Args:
      workdir: of a run, or of a run with stages.
      out: a new or empty directory, or an earlier export; a path or a URL.
      stage: which stage, where `workdir` holds several.
      checkpoint: "last", "best" (by the run's `checkpoint.best_metric`) or a number.
      dtype: of the weights in the file; None: as they were trained.

    Returns:
      The directory.

    Raises:
      InputError: no such run, stage or checkpoint, or something else lies at `out`.
    """
    run = find_run(workdir, stage)
    config = _read_config(run)

    import jax

    from jaxalign.models.config import read_config
    from jaxalign.models.export import check_target, save
    from jaxalign.models.hub import CONFIG, locate
    from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer
    from jaxalign.models.transformer import Model
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings
    from jaxalign.train.rundir import usable

    with usable(out, "--out exported/NAME"):
        check_target(out)
    step = _choose(run, config, checkpoint)
    with usable(out, "--out exported/NAME"):
        _probe(out)
    given = config["model"]
    source, revision = given["path"], given["revision"]
    if not os.path.isdir(os.path.expanduser(source)) and (run / "export" / CONFIG).exists():
        source, revision = os.fspath(run / "export"), None  # the start has moved; the end describes the same model
    directory = locate(source, revision, weights=False)
    role, head = ("reward", "score") if config["algorithm"]["name"] == "reward" else ("policy", "lm")
    description = read_config(
        directory, dtype=given["dtype"], param_dtype=given["param_dtype"], remat="none", head=head
    )
    model = Model(description)
    mesh = make_mesh(defaults("sft").mesh)  # this machine's, not the run's
    abstract = model.abstract()
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, param_shardings(mesh, abstract)
    )
    tokenizer = load_tokenizer(
        given["tokenizer"] or source, None if given["tokenizer"] else revision, given["chat_template"]
    )
    check_vocabulary(tokenizer, description.vocab_size, source)
    params = _restore(run / "checkpoints" / str(step) / "state", role, like)
    return save(out, model, params, source=directory, tokenizer=tokenizer, dtype=dtype)


def find_run(workdir: str, stage: str | None) -> Any:
    """The directory of one stage.

    Args:
      workdir: of a run, or of a run with stages.
      stage: its name; None where there is only one.

    Raises:
      InputError: there is no run, or several.
    """
    from jaxalign.train.rundir import RunDir, usable

    root = RunDir(workdir).path  # absolute: Orbax takes no other
    with usable(root, "--workdir runs/NAME"):
        there = root.is_dir()
    if not there:
        raise InputError(f"no directory {workdir}", "the workdir of a run", "--workdir runs/NAME")
    names = sorted(p.name for p in root.iterdir() if p.name != "export" and (p / "config.json").exists())
    if stage is not None and not names and (root / "config.json").exists():
        raise InputError(
            f"--stage {stage}, but {workdir} is a run without stages", "no --stage", f"--workdir {workdir}"
        )
    if stage is not None:
        if stage not in names:
            shown = ", ".join(names) or "none"
            raise InputError(
                f"no stage {stage!r} in {workdir}",
                f"one of its stages: {shown}",
                f"--stage {names[0] if names else 'NAME'}",
            )
        return root / stage
    if (root / "config.json").exists():
        return root
    current = [n for n in names if ".old-" not in n]
    if len(current) == 1:
        return root / current[0]
    if not current:
        raise InputError(
            f"{workdir} holds no run", "a workdir with config.json and checkpoints/", "--workdir runs/NAME"
        )
    raise InputError(f"{workdir} holds the stages {', '.join(current)}", "one of them", f"--stage {current[-1]}")


def _probe(out: str) -> None:
    """Writes beside `out`, as the export will, before the model is read."""
    if "://" in out:
        return
    target = Path(out).expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    probe = target.with_name(f".{target.name}.{os.getpid()}.part")
    probe.mkdir()
    probe.rmdir()


def _read_config(run: Any) -> dict[str, Any]:
    written = json.loads((run / "config.json").read_text())
    if written.get("format") != FORMAT:
        raise InputError(
            f"{run} has run format {written.get('format')}",
            f"format {FORMAT}, which this version of jaxalign reads",
            "the version of jaxalign that wrote it",
        )
    return written["config"]


def _choose(run: Any, config: dict[str, Any], checkpoint: str) -> int:
    """The checkpoint's number; the run may be writing others meanwhile, so nothing is cleaned up."""
    import orbax.checkpoint as ocp

    folder = run / "checkpoints"
    metric = config["checkpoint"]["best_metric"]
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        save_interval_steps=0,
        best_fn=(lambda metrics: metrics[metric]) if metric else None,
        best_mode=config["checkpoint"]["best_mode"],
    )
    steps: list[int] = []
    if folder.exists():
        manager = ocp.CheckpointManager(folder, options=options)
        steps = sorted(manager.all_steps())
    if not steps:
        raise InputError(
            f"no checkpoint in {folder}", "a run that has saved one", "--config.checkpoint.every=100 in training"
        )
    if checkpoint == "last":
        return steps[-1]
    if checkpoint == "best":
        if not metric:
            raise InputError(
                f"{run} was trained without checkpoint.best_metric", "a metric to choose by", "--checkpoint last"
            )
        best = manager.best_step()
        return steps[-1] if best is None else best
    if not checkpoint.isdigit() or int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"checkpoint {checkpoint!r}", f"last, best or one of {known}", f"--checkpoint {steps[-1]}")
    return int(checkpoint)


def _restore(state: Any, role: str, like: Any) -> Any:
    """One role's parameters out of a saved state, into the given shapes, dtypes and shardings."""
    import orbax.checkpoint as ocp

    item = {"params": {role: like}}
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(state, args=args)["params"][role]
