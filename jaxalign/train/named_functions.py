"""User functions named in a configuration, "module:function" or "file.py:function": loaded and checked at start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import get
from jaxalign.errors import InputError
from jaxalign.functions import OURS, check_call, is_name, load_function, raised
from jaxalign.ops.advantages import estimator_options
from jaxalign.ranges import FUNCTIONS
from jaxalign.types import Terms, TrainState

OURS.add(__file__)


class Form(NamedTuple):
    """How the function of a field is called."""

    what: str
    call: str  # as text
    args: tuple[Any, ...]
    keywords: Mapping[str, Any] = {}


_FORMS = {
    "algorithm.loss": Form("loss", "loss(policy, ref, lengths, mask, *, beta)", ({}, {}, {}, None), {"beta": 0.1}),
    "algorithm.estimator": Form(
        "estimator", "estimator(rewards, mask, *, values, group)", (None, None), {"values": None, "group": None}
    ),
    "optimizer.name": Form("optimizer", "optimizer(learning_rate)", (lambda count: 1.0,)),
    "optimizer.schedule": Form("schedule", "schedule(step, num_steps)", (0, 1)),
    "callbacks": Form("callback", "callback(step, metrics, state)", (1, {}, None)),
}


def named_function(field: str, name: str) -> Callable[..., Any]:
    """The function that a field names.

    Args:
      field: one of those that take functions.
      name: "module:function" or "file.py:function".

    Raises:
      InputError: there is none, or its signature does not fit.
    """
    form = _FORMS[field]
    function = load_function(name, field, form.what)
    keywords = dict(form.keywords)
    if field == "algorithm.estimator":  # its own options are fields, see `own_estimator`
        keywords |= dict.fromkeys(estimator_options(function))
    return check_call(function, f"{field} {name}", form.call, *form.args, **keywords)


def find_functions(config: Any) -> None:
    """Loads every function that a stage names and checks its signature; none is called, no device is touched.

    Raises:
      InputError: naming the field, and what the function should be.
    """
    for field in FUNCTIONS:
        if is_name(name := get(config, field)):
            named_function(field, name)
    load_callbacks(get(config, "callbacks", ()))


def check_functions(config: Any) -> None:
    """Loads and tries every function that a stage names, before data and models are loaded.

    Raises:
      InputError: naming the field, and what the function should be.
    """
    if is_name(name := get(config, "algorithm.loss")):
        own_loss(name)
    if is_name(name := get(config, "algorithm.estimator")):
        own_estimator(name, config.algorithm)
    if is_name(name := get(config, "optimizer.schedule")):
        own_schedule(name)
    if is_name(name := get(config, "optimizer.name")):
        own_optimizer(name, lambda count: jnp.float32(1.0))
    load_callbacks(get(config, "callbacks", ()))


def load_callbacks(names: Any) -> tuple[Callable[..., Any], ...]:
    """The callbacks of a run, in order; see `call_back`."""
    for name in names:
        if not is_name(name):
            fix = "--config.callbacks=file.py:function"
            raise InputError(f"callbacks holds {name!r}", "module:function or file.py:function", fix)
    return tuple(functools.partial(call_back, named_function("callbacks", name), name) for name in names)


def call_back(
    function: Callable[..., Any], name: str, step: int, metrics: Mapping[str, float], state: TrainState
) -> dict[str, float]:
    """Calls a callback; what it returns, None or a dict of numbers, goes into the step's figures.

    Raises:
      InputError: it raised, or returned something else.
    """
    try:
        found = function(step, dict(metrics), state)
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit() in a callback must not end the run as if it were done
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        raise raised(error, file, f"callbacks {name}, at step {step},", "None, or a dict of numbers") from error
    try:
        return {str(key): float(value) for key, value in dict(found or {}).items()}
    except (TypeError, ValueError) as error:
        kind = type(found).__name__
        fix = f"return None from {name}"
        raise InputError(
            f"callbacks {name} returned {kind} at step {step}", "None, or a dict of numbers", fix
        ) from error


def own_loss(name: str) -> Callable[..., Terms]:
    """A loss on pairs that `algorithm.loss` names, tried on the shapes of two pairs."""
    function = named_function("algorithm.loss", name)
    ones = jax.ShapeDtypeStruct((2,), jnp.float32)
    pair = {"chosen": ones, "rejected": ones}
    terms = _tried(
        lambda *arrays: function(*arrays, beta=0.1), (pair, pair, pair, ones), f"algorithm.loss {name}", function
    )
    if not isinstance(terms, Terms) or terms.loss.shape != (2,):
        shown = f"loss {terms.loss.shape}" if isinstance(terms, Terms) else type(terms).__name__
        raise InputError(
            f"algorithm.loss {name} returned {shown} for 2 pairs",
            "jaxalign.types.Terms(loss [N], weight [N], metrics {name: (sum, weight)})",
            "return Terms(loss, mask, {})",
        )
    return function


def own_estimator(name: str, fields: Mapping[str, Any]) -> Callable[..., Any]:
    """An estimator of advantages that `algorithm.estimator` names, tried on the shapes of two completions.

    Args:
      name: of the function.
      fields: `config.algorithm`, where its own options are.
    """
    function = named_function("algorithm.estimator", name)
    who = f"algorithm.estimator {name}"
    options = estimator_options(function)
    if unknown := [option for option in options if option not in fields]:
        raise InputError(
            f"{who} takes the option {unknown[0]!r}, which is no field of algorithm",
            f"options among {', '.join(sorted(fields))}",
            f"a default for {unknown[0]!r} by functools.partial, in {name}",
        )
    numbers, mask = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.bool_)
    call = functools.partial(function, group=np.zeros(2, np.int32), **{option: fields[option] for option in options})
    found = _tried(lambda r, m, v: call(r, m, values=v), (numbers, mask, numbers), who, function)
    shapes = [getattr(x, "shape", None) for x in found] if isinstance(found, tuple) else None
    if shapes != [(2, 3), (2, 3)]:
        raise InputError(
            f"{who} returned {type(found).__name__ if shapes is None else shapes} for rewards [2, 3]",
            "(advantages [B, R], returns [B, R]): the value model learns the returns",
            "return advantages, jnp.where(mask, advantages + values, 0)",
        )
    return function


def own_schedule(name: str) -> Callable[..., Any]:
    """A schedule that `optimizer.schedule` names: schedule(step, num_steps) -> share of the peak learning rate."""
    function = named_function("optimizer.schedule", name)
    step = jax.ShapeDtypeStruct((), jnp.float32)
    found = _tried(lambda count: jnp.asarray(function(count, 10)), (step,), f"optimizer.schedule {name}", function)
    if found.shape != ():
        raise InputError(
            f"optimizer.schedule {name} returned an array {found.shape}", "one number", f"a scalar from {name}"
        )
    return function


def own_optimizer(name: str, schedule: Callable[[Any], Any]) -> Any:
    """What `optimizer.name` names, made: optimizer(learning_rate) -> an optax transformation that decays by itself."""
    function = named_function("optimizer.name", name)
    try:
        made = function(schedule)
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        raise raised(error, file, f"optimizer.name {name}", "an optax transformation") from error
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise InputError(
            f"optimizer.name {name} returned {type(made).__name__}",
            "an optax.GradientTransformation",
            "return optax.adamw(learning_rate)",
        )
    return made


def _tried(call: Callable[..., Any], arrays: tuple[Any, ...], who: str, function: Callable[..., Any]) -> Any:
    """What a call gives, by shapes alone."""
    try:
        return jax.eval_shape(call, *arrays)
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        raise raised(error, file, who, "a function that jax can trace, of jax.numpy operations") from error
