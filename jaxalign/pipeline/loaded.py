"""A model ready for inference: weights on the local devices, tokenizer, stop tokens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxalign.config import defaults
from jaxalign.data.template_inputs import set_defaults
from jaxalign.data.tokenize import Encoder
from jaxalign.errors import InputError
from jaxalign.evaluate.sequences import Tokens
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.hf import check_numbers, load
from jaxalign.models.hub import locate
from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from jaxalign.models.transformer import Model
from jaxalign.ops.precision import require_dtypes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.parallel.startup import start
from jaxalign.rollout.engine import Generator
from jaxalign.rollout.sampling import Sampling
from jaxalign.types import Params

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Loaded(NamedTuple):
    """A model for inference."""

    path: str
    model: Model
    params: Params
    tokenizer: Any
    stop_ids: tuple[int, ...]
    mesh: jax.sharding.Mesh
    context: int | None  # tokens that the model was made for; None where its config does not say

    def generator(self, sampling: Sampling, **options: Any) -> Generator:
        """What continues texts with this model.

        Args:
          sampling: how, and how many tokens at most.
          options: `batch_size` and `columns`, if not `Generator`'s own.
        """
        options |= {"stop_ids": self.stop_ids, "mesh": self.mesh}
        return Generator(self.model, self.params, self.tokenizer, sampling=sampling, **options)


def load_model(
    path: str,
    *,
    head: str,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
    flag: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Loads a directory or hub id over this machine's devices, weights split among them.

    Args:
      path: a directory in Hugging Face form, or a hub id.
      head: "lm" or "score", what the checkpoint must have.
      dtype: of weights and computation; None: the configuration's default.
      devices: None: all.
      flag: of the command line that gave the path, for messages.
      chat_template_kwargs: values of names that the chat template reads.

    Raises:
      InputError: no such model, or one of the other kind; a name that its template never reads.
    """
    _, tokenizer = require_head(path, head, flag)
    set_defaults(tokenizer, chat_template_kwargs or {}, "--chat_template_kwargs")
    common, dtype = defaults("sft"), _usable(dtype)
    start()
    mesh = make_mesh(common.mesh, devices)
    with _without_config(path, flag):
        model, params = load(
            path,
            dtype=dtype,
            param_dtype=dtype,
            remat="none",
            head=head,
            shardings=lambda tree: param_shardings(mesh, tree),
        )
    return Loaded(path, model, params, tokenizer, stop_ids(path, tokenizer), mesh, model.config.context)


def check_weights(path: str, *, head: str, dtype: str | None = None, flag: str = "") -> None:
    """Checks a model that is loaded only after another one's work.

    Args:
      path: a directory in Hugging Face form, or a hub id.
      head: "lm" or "score".
      dtype: as `load_model` takes it.
      flag: of the command line that gave the path, for messages.

    Raises:
      InputError: weights that are not there, not whole, or no numbers.
    """
    with _without_config(path, flag):
        check_numbers(path, dtype=_usable(dtype), head=head)


def _usable(dtype: str | None) -> str:
    """The dtype of `--dtype`, or the configuration's default."""
    dtype = defaults("sft").model.dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise InputError(f"--dtype {dtype}", f"one of {', '.join(_DTYPES)}", f"--dtype {_DTYPES[0]}")
    try:
        require_dtypes(dtype=dtype)
    except InputError as error:
        fix = "JAX_ENABLE_X64=1 before the command, or --dtype float32"
        raise InputError("--dtype float64, and JAX computes in 32 bits at most", error.expected, fix) from None
    return dtype


@contextlib.contextmanager
def _without_config(path: str, flag: str = "") -> Iterator[None]:
    """Rewrites fixes that name config fields, for commands that have flags instead."""
    try:
        yield
    except InputError as error:
        here = f"{flag} DIR, in place of {path}" if flag else f"in place of {path}: DIR"
        fix = error.fix.replace("--config.model.path=DIR", here).replace(
            "--config.model.path=", f"{flag} " if flag else f"in place of {path}: "
        )
        fix = fix.replace("--config.model.tokenizer=", f"in {path}, the tokenizer files of ")
        raise InputError(error.found, error.expected, fix) from error


def read_tokenizer(path: str, flag: str = "") -> Any:
    """The tokenizer of a model; `flag` gave the path.

    Raises:
      InputError: no such model, or none in it.
    """
    with _without_config(path, flag):
        return load_tokenizer(path)


def require_head(path: str, head: str, flag: str = "") -> tuple[ModelConfig, Any]:
    """The description and the tokenizer of a model, once they are known to be of the right kind and to agree.

    Args:
      path: a directory in Hugging Face form, or a hub id.
      head: "lm" or "score".
      flag: of the command line that gave the path, for messages.

    Raises:
      InputError: no such model, a broken one, or one of the other kind.
    """
    with _without_config(path, flag):
        config = read_config(locate(path, weights=False), dtype="float32", param_dtype="float32", remat="none")
    scalar, given = config.head == "score", f"{flag} {path}".strip()
    of = f"{flag or '--model'} DIR"
    if scalar and head == "lm":
        scores = f"jaxalign score --model {path} --data FILE.jsonl"
        raise InputError(f"{given} is a reward model", "a language model, with a token head", f"{of}; or {scores}")
    if not scalar and head == "score" and flag == "--reward":
        raise InputError(
            f"{given} is a language model, without a score",
            "a reward model, or a function",
            f"{of} or FILE.py:FUNCTION",
        )
    if not scalar and head == "score":
        raise InputError(
            f"{given} is a language model, without a score",
            "a reward model, or a reference for DPO's implicit reward",
            f"jaxalign score --model {path} --ref DIR --beta 0.1 --data FILE.jsonl",
        )
    tokenizer = read_tokenizer(path, flag)
    fix = f"{flag or '--model'} DIR, a model with a tokenizer of its own"
    check_vocabulary(tokenizer, config.vocab_size, path, fix)
    return config, tokenizer


def tokenize(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], places: Sequence[str], *, separate: bool = False
) -> list[Tokens]:
    """Plain strings to tokens, prompt and completion as one text as in training; nothing is added at the end.

    The prompt has the tokenizer's own special tokens, one BOS at most. Its tokens are those that end at or before its
    end: a token that merges over the boundary is the completion's.

    Args:
      tokenizer: of transformers.
      pairs: (prompt, completion).
      places: where each stands, for messages.
      separate: tokenise the two apart, so that no token crosses the boundary; the completion's first token is then
        seldom the one that the model would write.

    Raises:
      InputError: a prompt that gives no token, so that nothing predicts the completion's first one.
    """
    encoder = Encoder(tokenizer)
    texts = [prompt if separate else prompt + completion for prompt, completion in pairs]
    found = []
    if separate:
        after = [e.ids.tolist() for e in encoder.encode([c for _, c in pairs], [True] * len(pairs))]
    for i, (place, (prompt, _), encoded) in enumerate(
        zip(places, pairs, encoder.encode(texts, [False] * len(pairs)), strict=True)
    ):
        ids = encoded.ids.tolist()
        split = len(ids) if separate else encoded.before(len(prompt))
        if not split and encoder.bos_id is not None:  # an empty prompt, or one that merged into the completion
            ids, split = ([] if ids[:1] == [encoder.bos_id] else [encoder.bos_id]) + ids, 1
        if not split:
            raise InputError(
                f"{place}: the prompt gives no token",
                "at least one: the completion's first token is predicted from it",
                f"start the prompt with {tokenizer.bos_token or tokenizer.eos_token or 'a token'}",
            )
        found.append(Tokens(ids[:split], after[i] if separate else ids[split:]))
    return found


def warn_of_context(path: str, limit: int | None, lengths: Sequence[int], places: Sequence[str]) -> None:
    """Warns on standard error of sequences longer than the model's context.

    Args:
      path: the model's.
      limit: tokens that it was made for; None where its config does not say.
      lengths: tokens of each sequence.
      places: where each stands.
    """
    long = [p for p, n in zip(places, lengths, strict=True) if limit is not None and n > limit]
    if long:
        more = f" and {len(long) - 1} more" if len(long) > 1 else ""
        print(f"warning: {long[0]}{more}: longer than the {limit} tokens that {path} was made for", file=sys.stderr)
