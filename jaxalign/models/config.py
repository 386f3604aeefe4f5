"""The one description of a model that everything is derived from, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models import families, hf_fields, hf_values
from jaxalign.models.adapter import Adapter
from jaxalign.models.added_tokens import Added
from jaxalign.models.family import Family
from jaxalign.models.hub import ADAPTER_CONFIG, CONFIG, base_of, is_adapter_dir, read_json
from jaxalign.models.text_part import text_fields
from jaxalign.models.token_rows import TokenRows
from jaxalign.ops.rope import Rope

HEADS = ("lm", "score")
_TASKS = {"CAUSAL_LM": "lm", "SEQ_CLS": "score"}  # of adapters, by the head that they are trained with
REMAT = ("none", "dots", "attention", "offload", "full", "auto")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; family differences are fields."""

    vocab_size: int  # V
    num_layers: int  # L
    embed_dim: int  # D
    mlp_dim: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    norm_eps: float
    rope: Rope  # of all layers, where there are no `ropes`
    tied: bool  # the head is the embedding transposed
    attention_bias: bool  # of queries, keys and values, and of attention's output where `output_bias` is None
    mlp_bias: bool
    initializer_range: float
    head: str  # "lm": token logits; "score": one number a token, or `num_labels`
    dtype: str  # of the computation
    param_dtype: str  # of the parameters
    # What the backward pass keeps: "none": everything; "dots": matmul outputs; "offload": these, in the host's memory;
    # "full": layer inputs.
    remat: str
    # What not every family has. None is the model without it: `identity.describe` leaves it out.
    output_bias: bool | None = None  # of attention's output; None: as `attention_bias` says
    norm: str | None = None  # None: by the root mean square; "layer": by mean and variance, with a bias (LayerNorm)
    norms: str | None = None  # of a layer's attention and mlp: None: before each; "after": after each; "both"
    norm_offset: float | None = None  # norms multiply by it plus their scale, which stays as the checkpoint has it
    parallel: bool | None = None  # attention and mlp both read a layer's input; None: mlp reads what attention made
    plain_mlp: bool | None = None  # without a gate
    activation: str | None = None  # of the mlp, or its gate; None: SiLU; "gelu", "gelu_tanh": its approximation by tanh
    embed_scale: float | None = None  # tokens' vectors times it, rounded to `dtype`; not the head's, where it is tied
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(H)
    residual_scale: float | None = None  # of what attention and mlp add to a layer's input
    attention_softcap: float | None = None  # the largest score
    logit_scale: float | None = None  # of the token head's logits
    logit_softcap: float | None = None  # the largest logit of the token head
    # Queries and keys are normalised before they turn, "head": head by head; "projection": all heads together.
    qk_norm: str | None = None
    num_positions: int | None = None  # P, of a table whose rows are added to the tokens' vectors; None: there is none
    ropes: tuple[Rope | None, ...] | None = None  # of each layer, where they differ; None in it: nothing turns
    windows: tuple[int | None, ...] | None = None  # of each layer: how many positions back it sees, its own among them
    adapter: Adapter | None = None  # that is trained beside the kernels
    quantised: str | None = None  # of the layers' kernels, which are frozen: "int8" or "nf4", see `ops.quantised`
    cuts: tuple[int, ...] | None = None  # layers at which another stack begins, see `stacks`; None: there is one
    num_labels: int | None = None  # of the scalar head; None: one
    score_bias: bool | None = None  # whether a classifier of tokens has one; None: it is none
    added: Added | None = None  # tokens that the checkpoint has no vectors of, which `vocab_size` counts
    token_rows: TokenRows | None = None  # tokens whose vectors are trained beside their table; None: none are
    hf_config: str = dataclasses.field(default="{}", compare=False, repr=False)  # the original JSON, for export

    @property
    def hf(self) -> dict[str, Any]:
        """The original `config.json`, every field of it."""
        return json.loads(self.hf_config)

    def for_length(self, longest: int) -> ModelConfig:
        """The same model for sequences of up to this length, where a rope type depends on it and states none.

        Raises:
          InputError: the model has no positions for so many tokens.
        """
        if self.num_positions is not None and longest > self.num_positions:
            raise InputError(
                f"sequences of up to {longest:,} tokens, and the model's table has {self.num_positions:,} positions",
                f"at most {self.num_positions:,} tokens of prompt and completion together",
                "shorter texts, fewer new tokens, or a model with rotary positions",
            )
        ropes = self.ropes and tuple(rope and rope.for_length(longest) for rope in self.ropes)
        found = dataclasses.replace(self, rope=self.rope.for_length(longest), ropes=ropes)
        return self if found == self else found

    def with_added(self, added: Added | None) -> ModelConfig:
        """The same model with tokens beside its own."""
        return self if added is None else dataclasses.replace(self, vocab_size=added.vocab_size, added=added)

    def without_added(self) -> ModelConfig:
        """The model of the checkpoint, which may have no vectors of some tokens."""
        return self if self.added is None else dataclasses.replace(self, vocab_size=self.added.rows, added=None)

    @property
    def mlp_matrices(self) -> int:
        """How many matrices [D, F] a layer's mlp has."""
        return 2 if self.plain_mlp else 3

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence that the model was made for; None where its file does not say."""
        return self.num_positions or self.hf.get("max_position_embeddings")

    @property
    def family(self) -> Family:
        """What Hugging Face calls this model's fields and tensors."""
        return families.find(self.hf)


_MOST_NUMBERS = 10**14  # of a whole model


def read_hf(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model; of an adapter that of its base, with the head that the adapter was trained with.

    Raises:
      InputError: no such file, not a JSON object, or no base.
    """
    if not is_adapter_dir(directory):
        return read_json(directory / CONFIG)
    hf = text_fields(read_json(base_of(directory, weights=False) / CONFIG))
    head = _TASKS.get(str(read_json(directory / ADAPTER_CONFIG).get("task_type")))
    family = families.find(hf)
    if head is None or head == _built(hf, family):
        return hf
    one = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # no adapter names labels
    return hf | (one if head == "score" else {}) | {"architectures": [family.architectures[head]]}


def read_config(directory: Path, **settings: Any) -> ModelConfig:
    """Reads and checks the description of a model, see `read_hf`; it comes before anything else there is read.

    Args:
      directory: on this host, see `hub.locate`.
      settings: `dtype`, `param_dtype`, `remat`, `head` and `rope_length`, as `from_hf` takes them.

    Raises:
      InputError: naming the file, and the field that is missing or wrong.
    """
    hf = read_hf(directory)
    try:
        return from_hf(hf, **settings)
    except InputError as error:
        file = (base_of(directory, weights=False) if is_adapter_dir(directory) else directory) / CONFIG
        problem = error.problem.replace("in config.json", f"in {file}")
        raise InputError(problem, error.expected, error.fix, error.places) from error


def from_hf(
    hf: Mapping[str, Any],
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    head: str | None = None,
    rope_length: int | None = None,
) -> ModelConfig:
    """Reads a Hugging Face config of a family in `families`.

    Args:
      hf: the parsed `config.json`, of transformers 5 (`rope_parameters`) or older (`rope_theta`, `rope_scaling`); with
        a `text_config`, of which the text model is read.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes, one of `REMAT`.
      head: "lm", "score" with one label, or None for what `architectures` names, with all its labels.
      rope_length: of the longest sequence, for the rope types that depend on it, see `ops.rope.Rope`.

    Returns:
      The model's description.

    Raises:
      InputError: naming a field that changes the mathematics and is not honoured, or that is missing or wrong.
    """
    hf = text_fields(hf)
    family = families.find(hf)
    hf_fields.check_not_quantised(hf)
    hf_fields.check_known(hf, family.honoured, family.neutral)
    _one_of("head", "lm" if head is None else head, HEADS)
    _one_of("remat", remat, REMAT)
    heads = _head(hf, family, head)
    if "max_position_embeddings" in hf:
        hf_values.integer(hf, "max_position_embeddings")
    fields = family.fields(hf) | heads | {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    if any(i >= fields["vocab_size"] for i in hf_values.token_ids(hf, "eos_token_id")):
        expected = f"an id of the vocabulary, below {fields['vocab_size']}"
        raise hf_values.wrong("eos_token_id", hf["eos_token_id"], expected)
    config = ModelConfig(**fields, hf_config=json.dumps(dict(hf)))
    if (count := _count(config)) > _MOST_NUMBERS:
        raise InputError(
            f"the sizes in config.json make {count:.0e} parameters",
            f"at most {_MOST_NUMBERS:.0e}",
            "the checkpoint's own config.json",
        )
    return config if rope_length is None else config.for_length(rope_length)


def _head(hf: Mapping[str, Any], family: Family, asked: str | None) -> dict[str, Any]:
    """The fields of the head: the checkpoint's own, or the one that is asked for."""
    built, labels = _built(hf, family), hf.get("id2label")
    if not isinstance(labels, (Mapping, type(None))):
        raise hf_values.wrong("id2label", labels, "an object of names by number, or no such field")
    if built == "lm" or asked == "lm":
        return {"head": asked or built}
    # Two are what transformers takes, and does not write.
    count = hf_values.integer(hf, "num_labels", len(labels or ()) or 2)
    if labels is not None and len(labels) != count:
        raise hf_values.wrong("id2label", labels, f"names of num_labels {count}")
    if asked == "score" and (built != "score" or count != 1):
        one = f"{family.architectures['score']} with one label, the score of a reward model"
        raise InputError(
            f"{family.architectures[built]} with {count} labels in config.json",
            one,
            "--config.model.path=a checkpoint with num_labels 1",
        )
    bias = hf_values.flag(hf, "token_classification_bias", True) if built == "tokens" else None
    return {"head": "score", "num_labels": None if count == 1 else count, "score_bias": bias}


def _built(hf: Mapping[str, Any], family: Family) -> str:
    """The head that `architectures` names; a token head where there is no such field."""
    named = hf.get("architectures") or [family.architectures["lm"]]
    for head, architecture in family.architectures.items():
        if isinstance(named, list) and named[0] == architecture:
            return head
    raise InputError(
        f"architectures {hf_values.shown(named)} in config.json",
        " or ".join(family.architectures.values()),
        "--config.model.path=such a checkpoint",
    )


def _count(c: ModelConfig) -> int:
    """Parameters, but for norms and biases."""
    attention = 2 * c.embed_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
    layer = attention + c.mlp_matrices * c.embed_dim * c.mlp_dim
    ends = (c.num_positions or 0) + c.vocab_size * (1 if c.tied else 2)
    return c.num_layers * layer + ends * c.embed_dim


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}", f"one of {', '.join(allowed)}", f"--config.model.{name}={allowed[0]}")
