"""Mistakes in a configuration, in words: names that no field has, values of another type, files that break."""

from __future__ import annotations

import difflib
import os
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config import defaults, get, leaves
from jaxalign.errors import InputError
from jaxalign.ranges import ALGORITHMS

_NONE = object()

# What other programs call a field, TRL and transformers before all; a name with a dot is meant within that section.
# Of several fields the first that the tree has.
_ALIASES: dict[str, tuple[str, ...]] = {
    alias: tuple(fields.split())
    for aliases, fields in (
        ("output_dir save_dir logdir", "workdir"),
        ("per_device_train_batch_size train_batch_size global_batch_size bs", "batch_size"),
        ("gradient_accumulation_steps accumulation_steps accumulate_grad_batches", "grad_accum_steps"),
        ("num_train_epochs epochs max_epochs n_epochs", "num_epochs"),
        ("max_steps num_steps total_steps total_episodes", "num_train_steps"),
        ("model_name_or_path model_name pretrained_model_name_or_path sft_model_path base_model", "model.path"),
        ("model.name model.model model.dir model.directory model.id", "model.path"),
        ("tokenizer_name tokenizer_name_or_path", "model.tokenizer"),
        ("bf16 fp16 torch_dtype precision mixed_precision compute_dtype", "model.dtype"),
        ("gradient_checkpointing activation_checkpointing", "model.remat"),
        ("attn_implementation flash_attention", "model.attention"),
        ("dataset_name dataset datasets train_file train_files train_dataset data_path", "data.sources"),
        ("data.path data.paths data.file data.files data.train data.source data.train_sources", "data.sources"),
        ("eval_dataset eval_file data.eval data.eval_path data.validation", "data.eval_sources"),
        ("test_size val_size eval_split validation_split", "data.eval_fraction"),
        ("max_seq_length max_seq_len seq_len seq_length sequence_length context_length cutoff_len", "data.max_length"),
        ("max_completion_length max_target_length", "data.max_completion_length rollout.max_new_tokens"),
        ("response_length max_response_length max_tokens", "rollout.max_new_tokens data.max_completion_length"),
        ("max_prompt_length max_input_length", "data.max_prompt_length"),
        ("truncation_mode", "data.truncation"),
        ("lr optimizer.lr peak_lr policy_lr actor_lr", "optimizer.learning_rate"),
        ("critic_lr value_lr", "optimizer.value_learning_rate"),
        ("lr_scheduler_type lr_scheduler scheduler lr_schedule", "optimizer.schedule"),
        ("warmup_ratio warmup num_warmup_steps", "optimizer.warmup_steps"),
        ("min_lr min_lr_ratio", "optimizer.final_fraction"),
        ("optim optimizer.type", "optimizer.name"),
        ("adam_beta1 beta1", "optimizer.b1"),
        ("adam_beta2 beta2", "optimizer.b2"),
        ("adam_epsilon epsilon", "optimizer.eps"),
        ("gradient_clipping grad_clip max_norm gradient_clip_val", "optimizer.max_grad_norm"),
        ("wd", "optimizer.weight_decay"),
        ("loss_type", "algorithm.loss"),
        ("dpo_beta", "algorithm.beta"),
        ("precompute_ref_log_probs", "algorithm.reference"),
        ("ref_model ref_model_path ref_model_name_or_path reference_model", "algorithm.reference_path"),
        ("kl_penalty init_kl_coef kl_beta kl_coeff", "algorithm.kl_coef"),
        ("target_kl", "algorithm.max_approx_kl"),
        ("cliprange clip_eps clip_epsilon clip_ratio", "algorithm.clip_range"),
        ("cliprange_value value_clip vf_clip", "algorithm.value_clip_range"),
        ("lam lambda gae", "algorithm.gae_lambda"),
        ("ppo_epochs noptepochs num_policy_updates", "algorithm.num_ppo_epochs"),
        ("num_mini_batches mini_batch_size", "algorithm.num_minibatches"),
        ("center_rewards_coefficient", "algorithm.center_coef"),
        ("value_model value_model_path critic critic_path", "algorithm.value_path"),
        ("reward_model reward_model_path rewards.path", "rewards.model"),
        ("reward_funcs reward_fn reward_function", "rewards.function"),
        ("whiten_rewards", "rewards.whiten"),
        ("stop_token stop_sequences stop_strings eos", "rollout.stop"),
        ("num_generations num_return_sequences n_samples group_size", "rollout.num_samples"),
        ("eval_steps evaluation_strategy eval_strategy eval_every eval_interval", "eval.every"),
        ("save_steps save_strategy save_every save_interval checkpoint_every", "checkpoint.every"),
        ("save_total_limit", "checkpoint.keep"),
        ("metric_for_best_model load_best_model_at_end", "checkpoint.best_metric"),
        ("greater_is_better", "checkpoint.best_mode"),
        ("resume_from_checkpoint", "checkpoint.resume"),
        ("logging_steps log_every log_interval", "logging.every"),
        ("report_to wandb run_name wandb_name", "logging.wandb_project"),
        ("num_sample_generations sample_every", "logging.samples_every"),
        ("tp tensor_parallel tensor_parallel_size", "mesh.tensor"),
        ("dp data_parallel data_parallel_size", "mesh.data"),
    )
    for alias in aliases.split()
}


def nearest_field(config: ConfigDict, name: str) -> str:
    """The existing dotted field that was most likely meant: what others call so, else the name most like it.

    A field of the same section counts as nearer than one of another.

    >>> nearest_field(defaults("dpo"), "optimizer.learnin_rate"), nearest_field(defaults("sft"), "lr")
    ('optimizer.learning_rate', 'optimizer.learning_rate')
    """
    names = list(leaves(config))
    section, _, tail = name.rpartition(".")
    stage = name.partition(".")[0]
    own = name.removeprefix(f"{stage}.") if stage in config.get("stages", ()) else name
    meant = _ALIASES.get(own.lower(), ())
    if tail not in {n.rpartition(".")[2] for n in names}:  # else it is a field's own name, in another section
        meant = meant or _ALIASES.get(tail.lower(), ())
    for field in meant:
        there = [n for n in names if f".{n}".endswith(f".{field}")]
        if there:
            return next((n for n in there if n.startswith(f"{stage}.")), there[0])

    def likeness(other: str) -> float:
        there, _, its_tail = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, tail, its_tail).ratio()
        return alike + 0.25 * (there == section) + 0.1 * difflib.SequenceMatcher(None, name, other).ratio()

    return max(names, key=likeness, default="")


def no_field(config: ConfigDict, field: str, found: str, where: str = "") -> InputError:
    """What to say of a name that no field has: a stage's field without the stage, another algorithm's, or misspelt.

    Args:
      config: the whole tree.
      field: dotted name.
      found: the beginning of the message.
      where: the line of a config file; "": the name came as a flag.
    """

    def fix(name: str) -> str:
        return f"{where}: {name}" if where else f"--config.{name}=..."

    names = config.stages if "stages" in config else ()
    staged = [
        f"{stage}.{field}" for stage in names if stage in config and get(config[stage], field, _NONE) is not _NONE
    ]
    if staged:
        return InputError(found, f"the name of a stage before it: {', '.join(staged)}", fix(staged[0]))
    stage, _, rest = field.partition(".")
    section, own = (config[stage], rest) if stage in names and stage in config else (config, field)
    others = [name for name in ALGORITHMS if get(defaults(name), own, _NONE) is not _NONE] if own else []
    algorithm = get(section, "algorithm.name")
    if others and algorithm:
        return InputError(
            f"{found} for {algorithm}",
            f"{own} is a field of {' and '.join(others)}",
            f"{where}: without it" if where else f"without --config.{field}, or a config of defaults({others[0]!r})",
        )
    near = nearest_field(config, field)
    return InputError(found, f"the nearest name is {near}", fix(near))


_UNKNOWN_KEY = re.compile(r"""Key "(\w+)" does not exist|^'(\w+)'(\nDid you mean|$)""")
_WRONG_TYPE = re.compile(
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> "
    r"and cannot be casted to type <class '([\w.]+)'>",
    re.DOTALL,
)


def broken(file: Path, error: BaseException) -> InputError:
    """An exception in a user's config file, by the line in that file."""
    here = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _same_file(f.f_code.co_filename, file)]
    line = here[-1][1] if here else None
    if isinstance(error, SyntaxError) and _same_file(error.filename or "", file):
        line = error.lineno
    place = f"{file}:{line or '?'}"
    edit = f"line {line} of {file}" if line else f"edit {file}"
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    message = cause.args[0] if cause.args and isinstance(cause.args[0], str) else _said(error)
    name_of = _names_in(error, here[-1][0].f_locals if here else {})
    if isinstance(error, (AttributeError, KeyError)) and name_of and (match := _UNKNOWN_KEY.search(message)):
        root, prefix = name_of
        field = prefix + (match[1] or match[2])
        return no_field(root, field, f"{place}: there is no field {field}", edit)
    if isinstance(error, TypeError) and name_of and (match := _WRONG_TYPE.search(message)):
        return _wrong_type(place, edit, *name_of, *match.groups())
    if isinstance(error, SystemExit):
        return InputError(f"{place}: the file ends the program (SystemExit: {error.code})", "a return of config", edit)
    said = " ".join(_said(error).split())
    return InputError(f"{place}: {type(error).__name__}: {said[:1000]}", "a config file that runs", edit)


def _said(error: BaseException) -> str:
    """The exception's words; a config file's own exception may have none that can be made."""
    try:
        return str(error)
    except Exception:
        return ""


def _same_file(name: str, file: Path) -> bool:
    return os.path.realpath(name) == os.path.realpath(file)


def _names_in(error: BaseException, variables: dict[str, Any]) -> tuple[ConfigDict, str] | None:
    """The tree in which a field was looked for, and the dotted prefix of the section where that was.

    Args:
      error: raised by the tree.
      variables: of the config file's frame.
    """
    owners = [f.f_locals.get("self") for f, _ in traceback.walk_tb(error.__traceback__)]
    section = next((o for o in reversed(owners) if isinstance(o, ConfigDict)), None)
    if section is None:
        return None
    for tree in variables.values():
        prefix = _path_to(tree, section) if isinstance(tree, ConfigDict) else None
        if prefix:  # not the section itself: a longer name says more
            return tree, prefix
    return section, ""


def _path_to(tree: ConfigDict, section: ConfigDict, prefix: str = "") -> str | None:
    if tree is section:
        return prefix
    inner = ((key, tree[key]) for key in tree if isinstance(tree[key], ConfigDict))
    return next((p for k, v in inner if (p := _path_to(v, section, f"{prefix}{k}.")) is not None), None)


def _wrong_type(
    place: str, edit: str, root: ConfigDict, prefix: str, name: str, value: str, given: str, wanted: str
) -> InputError:
    """A value of another type than the field's."""
    quoted = repr(value) if given == "str" else value
    field = f"{prefix}{name}"
    example, expected = str(get(root, field)), f"a value of type {wanted}"
    if wanted == "tuple":
        example, expected = f"({quoted},)", "a tuple: the comma makes it one"
    elif wanted == "str":
        example, expected = repr(value), "a string"
    elif wanted in ("int", "float"):
        try:
            number = float(value)
            example = f"{number:g}" if wanted == "float" else str(int(number)) if number == int(number) else example
        except (ValueError, OverflowError):
            pass
    return InputError(f"{place}: {field} is {quoted}, of type {given}", expected, f"{edit}: {field} = {example}")
