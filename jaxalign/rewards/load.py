"""Loading a reward by its name: a reward model's directory, or a reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxalign.data.dialogues import render_plain
from jaxalign.data.files import is_url
from jaxalign.functions import load_function
from jaxalign.models import hf
from jaxalign.models.config import read_config
from jaxalign.models.hub import locate
from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rewards.function import FunctionScorer
from jaxalign.rewards.model import ModelScorer
from jaxalign.rewards.samples import Scorer


def load_scorer(name: str, *, dtype: str, mesh: Mesh | None = None, batch_size: int = 32) -> Scorer:
    """A reward that scores text.

    Args:
      name: "module:function" or "file.py:function"; else a reward model's directory, URL or hub id.
      dtype: of the model's weights and computation.
      mesh: where the model runs; None: one device.
      batch_size: rows at a time of a model.

    Returns:
      A Scorer: from `Samples` to a number (or None) each.

    Raises:
      InputError: no such function, or no model with a scalar head there.
    """
    if ":" in name and not is_url(name) and not Path(name).is_dir():
        return FunctionScorer(load_function(name), name)
    shardings = None if mesh is None else lambda tree: param_shardings(mesh, tree)
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "remat": "none", "head": "score"}
    described = read_config(locate(name, weights=False), **settings)
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, described.vocab_size, name, "a reward model with a tokenizer of its own")
    ends = stop_ids(name, tokenizer)
    model, params = hf.load(name, shardings=shardings, **settings)
    return ModelScorer(
        model, tokenizer, params, mesh=mesh, batch_size=batch_size, stop_ids=ends, plain=render_plain, name=name
    )
