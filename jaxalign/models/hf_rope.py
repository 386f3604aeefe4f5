"""The rotary embedding of a Hugging Face `config.json`, from either form of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxalign.models.hf_values import FULL, SLIDING, integer, number, shown, wrong
from jaxalign.ops.rope import KINDS, LongRope, Rope, Yarn

_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "longrope": ("original_max_position_embeddings",),
}
LOCAL_THETA = "rope_local_base_freq"
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
}
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"


def ropes_by_type(hf: Mapping[str, Any], head_dim: int, theta: float, sliding_theta: float) -> dict[str, Rope]:
    """The rotary embeddings of families whose layers have one by their type.

    `rope_parameters` holds both, as transformers 5 writes it; in older files `rope_theta` and `rope_scaling` are those
    of layers that see everything, and layers with a window have `rope_local_base_freq` and are never scaled.

    Args:
      hf: the parsed `config.json`.
      head_dim: of each head.
      theta: where the file does not say.
      sliding_theta: of layers with a window, where the file does not say.

    Raises:
      InputError: naming a field that is wrong or not honoured.
    """
    both = hf.get("rope_parameters")
    both = {FULL: None, SLIDING: None} if both is None else both
    if not isinstance(both, Mapping) or set(both) - {FULL, SLIDING}:
        raise wrong("rope_parameters", both, f"an object with those of {FULL!r} and of {SLIDING!r}")
    if hf.get(LOCAL_THETA) is not None:
        number(LOCAL_THETA, hf[LOCAL_THETA], None)
    local = {"rope_parameters": both.get(SLIDING), "rope_scaling": None, "rope_theta": hf.get(LOCAL_THETA)}
    return {
        FULL: rope({**hf, "rope_parameters": both.get(FULL)}, head_dim, default_theta=theta),
        SLIDING: rope({**hf, **local}, head_dim, default_theta=sliding_theta),
    }


def rope(hf: Mapping[str, Any], head_dim: int, *, turned: float = 1.0, default_theta: float = 10_000.0) -> Rope:
    """The one rotary embedding, from either form of config.

    Args:
      hf: the parsed `config.json`.
      head_dim: of each head.
      turned: the share of it that turns.
      default_theta: where the file does not say.
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, (Mapping, type(None))):
            raise wrong(name, value, "an object with a rope_type, or null")
    if new and old and _rope_type(new) != _rope_type(old):
        raise wrong("rope_scaling", old, f"the same as rope_parameters {shown(new)}")
    fields = dict(new or old or {})
    theta = fields.pop("rope_theta", None)
    theta = number("rope_theta", hf.get("rope_theta") if theta is None else theta, default_theta)
    if hf.get("rope_theta") is not None and hf["rope_theta"] != theta:
        raise wrong("rope_theta", hf["rope_theta"], f"the same as in rope_parameters, {theta:g}")
    if theta <= 1:
        raise wrong("rope_theta", theta, "a number above 1: at 1 every pair turns at one frequency")
    kind = _rope_type(fields)
    fields.pop("rope_type", None), fields.pop("type", None)
    if kind not in KINDS:
        raise wrong("rope_type", kind, f"one of {', '.join(KINDS)}")
    if kind in ("llama3", "yarn", "longrope") and fields.get(_ORIGINAL) is None:
        fields[_ORIGINAL] = hf.get("max_position_embeddings")
    for name in _ROPE_FIELDS[kind]:
        found = number(f"rope_parameters.{name}", fields.get(name), None)
        if name == _ORIGINAL and found < 1:
            raise wrong(f"rope_parameters.{name}", found, "a number of positions")
    for name, value in fields.items():
        if name in _ROPE_FIELDS[kind] or value is None or (name == _PARTIAL and value == turned):
            continue
        if kind == "default" and name in _ROPE_FIELDS["llama3"]:
            continue  # transformers ignores them for this type as well
        if name in _OPTIONS.get(kind, ()):
            continue
        raise wrong(f"rope_parameters.{name}", value, f"no such field for rope_type {kind!r}")
    dims = int(head_dim * turned)
    if dims % 2 or not dims:
        raise wrong(_PARTIAL, turned, f"a share of head_dim {head_dim} that is an even number of dims")
    more: dict[str, Any] = {"theta": theta, "dims": None if dims == head_dim else dims}
    if kind == "default":
        return Rope(**more)
    if kind == "longrope":
        length = int(fields[_ORIGINAL])
        return Rope(kind, original_length=length, longrope=_longrope(hf, fields, length, dims), **more)
    more |= {"kind": kind, "factor": float(fields["factor"])}
    if kind == "linear":
        return Rope(**more)
    if kind == "dynamic":
        return Rope(original_length=integer(hf, "max_position_embeddings"), **more)
    length = int(fields[_ORIGINAL])
    if kind == "yarn":
        return Rope(original_length=length, yarn=_yarn(fields), **more)
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    if high <= low:
        raise wrong("rope_parameters.high_freq_factor", high, f"more than low_freq_factor {low:g}")
    return Rope(low_freq_factor=low, high_freq_factor=high, original_length=length, **more)


def turned_share(hf: Mapping[str, Any], name: str = _PARTIAL, default: float = 1.0) -> float:
    """The share of a head's dims that turns, of a family in which it need not be all of them.

    Args:
      hf: the parsed `config.json`.
      name: of the field outside of the rope's own.
      default: where the file does not say.
    """
    own = hf.get("rope_parameters") or hf.get("rope_scaling")
    stated = own.get(_PARTIAL) if isinstance(own, Mapping) else None
    share = number(name, hf.get(name) if stated is None else stated, default)
    if share > 1:
        raise wrong(name, share, "a share of a head's dims, at most 1")
    return share


def _longrope(hf: Mapping[str, Any], fields: Mapping[str, Any], original: int, dims: int) -> LongRope:
    """Without an `attention_factor` it is made of how much longer the model's sequences are than the original ones."""
    divisors = {}
    for name in ("short_factor", "long_factor"):
        found = fields.get(name)
        if not isinstance(found, list) or len(found) != dims // 2:
            raise wrong(
                f"rope_parameters.{name}", found, f"{dims // 2} numbers, for the pairs of {dims} dims that turn"
            )
        divisors[name] = tuple(number(f"rope_parameters.{name}", value, None) for value in found)
    times = fields.get("factor")
    if times is None:
        times = integer(hf, "max_position_embeddings") / original
    times = number("rope_parameters.factor", times, None)
    if original < 2:
        raise wrong(f"rope_parameters.{_ORIGINAL}", original, "2 or more positions")
    factor = math.sqrt(1 + math.log(times) / math.log(original)) if times > 1 else 1.0
    factor = number("rope_parameters.attention_factor", fields.get("attention_factor"), factor)
    return LongRope(divisors["short_factor"], divisors["long_factor"], factor)


def _yarn(fields: Mapping[str, Any]) -> Yarn:
    """Without an `attention_factor` it is made of `factor`, as transformers' `_compute_yarn_parameters` does."""
    given = {name: fields[name] for name in _OPTIONS["yarn"] if fields.get(name) is not None}
    truncate = given.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise wrong("rope_parameters.truncate", truncate, "true or false")
    given = {name: number(f"rope_parameters.{name}", value, None) for name, value in given.items()}

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(fields["factor"]) + 1 if fields["factor"] > 1 else 1.0

    factor = scale(1.0)
    if "mscale" in given and "mscale_all_dim" in given:
        factor = scale(given["mscale"]) / scale(given["mscale_all_dim"])
    fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)
    return Yarn(fast, slow, truncate, given.get("attention_factor", factor))


def _rope_type(fields: Mapping[str, Any]) -> str:
    return str(fields.get("rope_type") or fields.get("type") or "default")
