"""PEFT's `adapter_config.json`: which modules have an update, of which rank and scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import InputError
from jaxalign.models.hub import read_json

MERGE = "merge it in PEFT: model.merge_and_unload().save_pretrained(DIR), and DIR in place of the adapter"
PREFIX = "base_model.model."  # of every key in an adapter's file, before the module's name
_OWN = "the adapter's own adapter_config.json"
_LARGEST = float(np.finfo(np.float32).max)  # scales are float32

# What PEFT makes of patterns: of the end of a module's name, and of whole names within it.
_END, _WITHIN = r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)"

# What is left out stands for these.
_DEFAULTS: Mapping[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
    "loftq_config": None,
    "use_rslora": False,
    "use_dora": False,
}
# Other fields that may have any value: how an adapter was started and trained, and what its tensors say themselves.
_UNREAD = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"}
    | {"fan_in_fan_out", "inference_mode", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"}
    | {"qalora_group_size", "revision", "runtime_config"}
)
# Starts that take a part of the base's kernels away: the base that the file names is then no longer the adapter's.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftConfig(NamedTuple):
    """What `adapter_config.json` says of the updates."""

    fields: Mapping[str, Any]

    @property
    def dora(self) -> bool:
        """Whether magnitudes are trained too."""
        return self.fields["use_dora"]

    @property
    def rslora(self) -> bool:
        """Whether scales are alpha / sqrt(rank)."""
        return self.fields["use_rslora"]

    @property
    def scores(self) -> bool:
        """Whether it is a sequence classifier's."""
        return self.fields["task_type"] == "SEQ_CLS"

    @property
    def whole_modules(self) -> list[str]:
        """Ends of the names of modules that were trained whole."""
        return self.fields["modules_to_save"] or []

    def rank(self, module: str) -> int:
        """Of a module's update."""
        return self._by_pattern("rank_pattern", module, self.fields["r"])

    def scale(self, module: str) -> float:
        """Of the product of a module's two matrices."""
        rank, alpha = self.rank(module), self._by_pattern("alpha_pattern", module, self.fields["lora_alpha"])
        return alpha / (rank**0.5 if self.rslora else rank)

    def _by_pattern(self, name: str, module: str, usual: Any) -> Any:
        """The value of the first pattern that matches the end of a name, after a dot."""
        values = self.fields[name]
        return next((values[key] for key in values if re.match(_END.format(key), module)), usual)

    def targets(self, module: str, layer: int) -> bool:
        """Whether a module of a layer has an update, by the rule with which PEFT gives it one."""
        if _named(self.fields["exclude_modules"] or [], module):
            return False
        if any(re.match(_WITHIN.format(name), module) for name in self.whole_modules):
            return False
        wanted, layers = self.fields["target_modules"], self.fields["layers_to_transform"]
        if wanted == "all-linear":
            return True
        if not _named(wanted, module):
            return False
        if isinstance(wanted, str) or module in wanted or layers is None or layers == []:
            return True
        return layer in (layers if isinstance(layers, list) else [layers])


def _named(names: str | list[str], module: str) -> bool:
    """Whether a regular expression is a module's whole name, or one of several names its end."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_peft_config(file: Path) -> PeftConfig:
    """Reads and checks an `adapter_config.json`.

    Raises:
      InputError: a field that changes what the adapter computes and is not honoured, or that is wrong.
    """
    told = {k: v for k, v in read_json(file).items() if v is not None}
    fields = {**_DEFAULTS, **told}

    def wrong(name: str, expected: str, fix: str = _OWN) -> InputError:
        return InputError(f"{name} {fields[name]!r} in {file}", expected, fix)

    if fields["peft_type"] != "LORA":
        raise wrong("peft_type", "'LORA', which rsLoRA and DoRA have too", MERGE)
    if fields["task_type"] not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise wrong("task_type", "'CAUSAL_LM', or 'SEQ_CLS' with one label", "the adapter of such a model")
    start = fields["init_lora_weights"]
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        expected = "an adapter of the base as it is; this start takes a part out of its kernels"
        raise wrong("init_lora_weights", expected, "save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    for name in told.keys() - _DEFAULTS.keys() - _UNREAD:
        if told[name]:
            raise wrong(name, "null: it changes what an adapter computes in a way that jaxalign does not know", MERGE)
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields[name], dict):
            raise wrong(name, "an object of numbers by pattern")
        for key, value in fields[name].items():
            _check_number(f"{name}[{key!r}]", value, file, whole=name == "rank_pattern")
            _check_pattern(name, key, file, _END)
    _check_number("r", fields["r"], file, whole=True)
    _check_number("lora_alpha", fields["lora_alpha"], file, whole=False)
    for name in ("use_rslora", "use_dora"):
        if not isinstance(fields[name], bool):
            raise wrong(name, "true or false")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value, pattern = fields[name], name != "modules_to_save"
        if isinstance(value, str) and pattern:
            _check_pattern(name, value, file)
        elif (value or name == "target_modules") and not _are_names(value):
            raise wrong(name, "a list of names" + ", or a regular expression" * pattern)
    for name in fields["modules_to_save"] or []:
        _check_pattern("modules_to_save", name, file, _WITHIN)
    return PeftConfig(fields)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_number(name: str, value: Any, file: Path, *, whole: bool) -> None:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not (value >= 1 if whole else abs(value) <= _LARGEST):  # NaN is not
        raise InputError(f"{name} {value!r} in {file}", "a positive integer" if whole else "a finite number", _OWN)


def _check_pattern(name: str, pattern: str, file: Path, form: str = "{}") -> None:
    try:
        re.compile(form.format(pattern))
    except re.error as error:
        raise InputError(f"{name} {pattern!r} in {file}: {error}", "a regular expression", _OWN) from error
