"""A run's checkpoint as a Hugging Face directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS
from jaxalign.relations import template_kwargs

if TYPE_CHECKING:
    from jaxalign.train.models import Role

FORMAT = 1  # of run directories that this version reads


def export(
    workdir: str,
    out: str,
    *,
    stage: str | None = None,
    checkpoint: str = "last",
    dtype: str | None = None,
    merge: bool = False,
) -> Path | str:
    """Writes the model of a checkpoint, of a run that is done, stopped or still going.

    Only the model's own weights are read, of the optimizer's state no more than schedule-free's average needs, and
    nothing in `workdir` is touched.

    Args:
      workdir: of a run, or of a run with stages.
      out: a new or empty directory, or an earlier export; a path or a URL.
      stage: which stage, where `workdir` holds several.
      checkpoint: "last", "best" (by the run's `checkpoint.best_metric`) or a number.
      dtype: of the weights in the file; None: as they were trained.
      merge: a whole model where an adapter was trained, which else is written in PEFT's form.

    Returns:
      The directory.

    Raises:
      InputError: no such run, stage or checkpoint, one that is damaged or holds numbers that are not finite, or
        something else lies at `out`.
    """
    run = find_run(workdir, stage)
    config = _read_config(run)

    import jax

    from jaxalign.models.config import read_config
    from jaxalign.models.export import check_target, only_here
    from jaxalign.models.hub import CONFIG, locate
    from jaxalign.models.tokenizer import add_tokens, check_vocabulary, ids_of, load_tokenizer
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings
    from jaxalign.train.card import model_card
    from jaxalign.train.checkpoints import read_meta
    from jaxalign.train.models import adapter_base, tokenizer_of_export, write_export
    from jaxalign.train.rundir import RunDir, usable
    from jaxalign.train.schedule_free import average, saved_z

    with usable(out, "--out exported/NAME"):
        check_target(out)
    step, steps = _choose(run, config, checkpoint)
    with usable(out, "--out exported/NAME"):
        _probe(out)
    given = config["model"]
    source, revision = given["path"], given["revision"]
    tokens = given.get("add_tokens") or ()  # an adapter's export is then the whole model, with the adapter in it
    if not os.path.isdir(os.path.expanduser(source)) and (run / "export" / CONFIG).exists() and not tokens:
        source, revision = os.fspath(run / "export"), None  # the start has moved; the end describes the same model
    directory = locate(source, revision, weights=False)
    algorithm = ALGORITHMS[config["algorithm"]["name"]]
    role = algorithm.trained
    mesh = make_mesh(defaults("sft").mesh)  # this machine's, not the run's
    own = given["tokenizer"] in (None, given["path"])  # another tokenizer has no revision
    of = (source, revision) if own else (given["tokenizer"], None)
    values = template_kwargs(config["data"].get("chat_template_kwargs"))  # a run of an earlier version has none
    tokenizer = load_tokenizer(*of, given["chat_template"], values)
    described = read_config(directory, dtype="float32", param_dtype="float32", remat="none")
    added = add_tokens(tokenizer, tokens, described.vocab_size)
    trained = _trained(config, source, revision, mesh, added, ids_of(tokenizer, tokens))
    check_vocabulary(tokenizer, trained.model.config.vocab_size, source)
    like = trained.abstract()
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, param_shardings(mesh, like)
    )
    wanted: dict[str, Any] = {"params": {role: like}}
    if config["optimizer"]["name"] == "schedule_free":
        wanted["opt"] = {role: saved_z(config["optimizer"], like)}
    found = _checked(run / "checkpoints", step, steps, wanted)
    params = found["params"][role]
    if "opt" in found:
        z = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(found["opt"]))
        params = average(params, z, config["optimizer"]["b1"])
    inputs = read_meta(run / "checkpoints" / str(step)).get("inputs")
    note, base = only_here(trained.model.config), adapter_base(trained, merge)
    card = model_card(RunDir(os.fspath(run)), config, step, inputs, note, base)
    kept = tokenizer_of_export(config, directory, tokenizer)
    rest = dict if trained.rest is None else trained.rest.load
    options = {"source": directory, "tokenizer": kept, "dtype": dtype, "card": card}
    return write_export(out, trained, params, rest, merge=merge, **options)


def _trained(config: Mapping[str, Any], source: str, revision: str | None, mesh: Any, *added: Any) -> Role:
    """The role that a run trains and exports; of a run of an earlier version what it has not is as it was."""
    from jaxalign.train.models import Roles

    algorithm = ALGORITHMS[config["algorithm"]["name"]]
    c = defaults(config["algorithm"]["name"]).unlock()
    for section in ("model", "adapter"):
        c[section].update({name: value for name, value in config.get(section, {}).items() if name in c[section]})
    c.data.max_length, c.seed = config["data"]["max_length"], config["seed"]
    c.model.path, c.model.revision, c.model.attention = source, revision, None
    roles = Roles(c, mesh, *added)
    return roles.scorer(source, 1.0) if algorithm.head == "score" else roles.policy(1.0)


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
                f"--stage {next(iter(get_close_matches(stage, names, n=1, cutoff=0.0)), 'NAME')}",
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
    current = _in_order(root, current)
    raise InputError(f"{workdir} holds the stages {', '.join(current)}", "one of them", f"--stage {current[-1]}")


def _in_order(root: Any, names: list[str]) -> list[str]:
    """Stages after those that they started from, and those of one depth as they were begun."""
    inputs: dict[str, set[str]] = {}
    for name in names:
        try:
            inputs[name] = set(json.loads((root / name / "stage.json").read_text())["from"].values()) & set(names)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):  # a run of its own, or a damaged record
            inputs[name] = set()

    def depth(name: str, below: frozenset[str] = frozenset()) -> int:
        return 1 + max((depth(other, below | {name}) for other in inputs[name] - below - {name}), default=0)

    return sorted(names, key=lambda name: (depth(name), (root / name / "config.json").stat().mtime))


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


def _choose(run: Any, config: dict[str, Any], checkpoint: str) -> tuple[int, list[int]]:
    """The checkpoint's number, and all there are; the run may be writing others meanwhile: nothing is cleaned up."""
    import orbax.checkpoint as ocp

    from jaxalign.train.checkpoints import best_by

    folder = run / "checkpoints"
    metric = config["checkpoint"]["best_metric"]
    mode = config["checkpoint"]["best_mode"]
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        save_interval_steps=0,
        best_fn=best_by(metric, mode) if metric else None,
        best_mode=mode,
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
        return steps[-1], steps
    if checkpoint == "best":
        if not metric:
            raise InputError(
                f"{run} was trained without checkpoint.best_metric", "a metric to choose by", "--checkpoint last"
            )
        best = manager.best_step()
        return steps[-1] if best is None else best, steps
    if not checkpoint.isdigit() or int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"checkpoint {checkpoint!r}", f"last, best or one of {known}", f"--checkpoint {steps[-1]}")
    return int(checkpoint), steps


def _checked(folder: Any, step: int, others: list[int], wanted: Any) -> Any:
    """Parts of a checkpoint, once they are known to be what was saved, and finite.

    Args:
      folder: of the checkpoints.
      step: whose.
      others: that there are.
      wanted: the parts of the state, with shapes, dtypes and shardings.
    """
    found, problem = _attempt(folder / str(step), wanted)
    if not problem:
        return found
    del found
    whole = next((n for n in reversed(others) if n != step and not _attempt(folder / str(n), wanted)[1]), None)
    raise InputError(
        f"checkpoint {step} of {folder} is damaged: {problem}",
        "a whole checkpoint" + ("; there is no other" if whole is None else f"; {whole} is one"),
        f"put the files of checkpoint {step} back" + ("" if whole is None else f", or --checkpoint {whole}"),
    )


def _attempt(folder: Any, wanted: Any) -> tuple[Any, str]:
    """(parts of a checkpoint, what is wrong with them or "")."""
    from jaxalign.train.checkpoints import check, read_meta, reading_problem

    try:
        meta = read_meta(folder)
        found = _restore(folder / "state", wanted)
    except Exception as error:  # whatever a reader says of bytes that it does not understand
        return None, reading_problem(error)
    return found, check(found, meta, f"checkpoint {folder.name}")


def _restore(state: Any, wanted: Any) -> Any:
    """Parts of a saved state, into the given shapes, dtypes and shardings."""
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(state, args=args)
