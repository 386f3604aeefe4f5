"""The public API beside the rooms' own functions: load a model, run a config, generate text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxalign.config import defaults
from jaxalign.models import hf
from jaxalign.models.transformer import Model
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.loaded import load_model
from jaxalign.pipeline.stages import run
from jaxalign.ranges import check_flags
from jaxalign.rollout.sampling import Sampling
from jaxalign.types import Params


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: str | None = None,
    head: str | None = None,
    key: jax.Array | None = None,
    shardings: Any = None,
    revision: str | None = None,
    rope_length: int | None = None,
) -> tuple[Model, Params]:
    """Reads a Hugging Face checkpoint as a model and its parameters.

    Args:
      path: a directory in Hugging Face form, on disk or at a URL, or a hub id.
      dtype: of the computation; None: the configuration's default, and so for the next two.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes: none, dots, attention, offload or full.
      head: "lm", "score", or None for what the checkpoint is.
      key: of a new scalar head; None: the checkpoint must have one.
      shardings: from the abstract parameters to a tree of shardings; None: the first local device.
      revision: of a hub id.
      rope_length: of the longest sequence, for the rope types dynamic and longrope; None: `Model.for_length` states it,
        or none is longer than what the model was first trained on.

    Returns:
      The model, whose `apply(params, rows)` gives hidden states, and its parameters, a nested dict of arrays.

    Raises:
      InputError: no such model, or one that is not supported.
    """
    usual = defaults("sft").model
    return hf.load(
        path,
        dtype=dtype or usual.dtype,
        param_dtype=param_dtype or usual.param_dtype,
        remat=remat or usual.remat,
        head=head,
        key=key,
        shardings=shardings,
        revision=revision,
        rope_length=rope_length,
    )


def train(config: ConfigDict | str | Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Runs a configuration, as `jaxalign train` does: one stage, or several in order.

    Args:
      config: a tree from `jaxalign.defaults` or `jaxalign.stages`, or a config file (Python, YAML or JSON).
      dry_run: report data, rows and memory; train nothing.

    Returns:
      The results of the stage, or of each stage by its name: `metrics`, `eval`, `export` (the model's directory), ...

    Raises:
      InputError: anything in configuration or data that the user can change.
    """
    tree = config if isinstance(config, ConfigDict) else load_config(str(config))
    return run(tree, dry_run=dry_run)


def generate(
    model: str,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Continues prompts.

    Args:
      model: directory or hub id of a language model.
      prompts: texts as they stand, or lists of messages, which are put into the model's chat template.
      max_new_tokens: most tokens of a completion; None: the configuration's default, and so for the next three.
      temperature: 0 always takes the likeliest token.
      top_k: samples among the k likeliest tokens; 0: off.
      top_p: samples among the likeliest tokens that make up this share; 1: off.
      seed: of the samples.
      dtype: of weights and computation; None: the configuration's default.
      chat_template_kwargs: values of names that the chat template reads, such as enable_thinking.

    Returns:
      The completions, in order.

    Raises:
      InputError: a model or a value that cannot be used.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = Sampling.of(defaults("dpo").rollout, **given)
    check_flags(seed=seed)
    loaded = load_model(model, head="lm", dtype=dtype, chat_template_kwargs=chat_template_kwargs)
    found = loaded.generator(sampling)(list(prompts), seed=seed)
    return [completion.text for completion in found]
