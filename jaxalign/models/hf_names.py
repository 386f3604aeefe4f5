"""The two-way table between Hugging Face tensor names and the parameter tree; one row serves loading and saving."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxalign.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its Hugging Face name, its path in the parameter tree, and how its dims move.

    `dims` reads "theirs -> ours": letters of DESIGN's dims, parentheses for dims that Hugging Face holds merged.
    """

    name: str  # "{layer}" stands for the number of the layer; ours are stacked along it
    path: str
    dims: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def pattern(self) -> re.Pattern:
        return re.compile(re.escape(self.name).replace(re.escape("{layer}"), r"(?P<layer>0|[1-9]\d*)"))

    def _plan(self) -> tuple[list[str], str, str]:
        theirs, ours = (side.strip() for side in self.dims.split("->"))
        groups = [a or b for a, b in re.findall(r"\((\w+)\)|(\w)", theirs)]
        return groups, "".join(groups), ours

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return tuple(math.prod(sizes[d] for d in group) for group in self._plan()[0])

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One layer's array in our layout, as a view: nothing is read until it is indexed."""
        _, flat, ours = self._plan()
        return tensor.reshape([sizes[d] for d in flat]).transpose([flat.index(d) for d in ours])

    def to_theirs(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse of `to_ours`, contiguous."""
        _, flat, ours = self._plan()
        return np.ascontiguousarray(array.transpose([ours.index(d) for d in flat])).reshape(self.shape(sizes))


_LAYER = "model.layers.{layer}."

LLAMA: tuple[Row, ...] = (
    Row("model.embed_tokens.weight", "embed/embedding", "VD -> VD"),
    Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
    Row(_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "(NH)D -> DNH"),
    Row(_LAYER + "self_attn.q_proj.bias", "layers/attention/query/bias", "(NH) -> NH"),
    Row(_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "(KH)D -> DKH"),
    Row(_LAYER + "self_attn.k_proj.bias", "layers/attention/key/bias", "(KH) -> KH"),
    Row(_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "(KH)D -> DKH"),
    Row(_LAYER + "self_attn.v_proj.bias", "layers/attention/value/bias", "(KH) -> KH"),
    Row(_LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "D(NH) -> NHD"),
    Row(_LAYER + "self_attn.o_proj.bias", "layers/attention/out/bias", "D -> D"),
    Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
    Row(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "FD -> DF"),
    Row(_LAYER + "mlp.gate_proj.bias", "layers/mlp/gate/bias", "F -> F"),
    Row(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "FD -> DF"),
    Row(_LAYER + "mlp.up_proj.bias", "layers/mlp/up/bias", "F -> F"),
    Row(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "DF -> FD"),
    Row(_LAYER + "mlp.down_proj.bias", "layers/mlp/down/bias", "D -> D"),
    Row("model.norm.weight", "norm/scale", "D -> D"),
    Row("lm_head.weight", "lm_head/kernel", "VD -> DV"),
    Row("score.weight", "score/kernel", "OD -> DO"),
)

# Keys of old files that hold nothing trained: tables that are computed, masks that are constants.
HARMLESS: tuple[str, ...] = (
    r".*rotary_emb\.inv_freq",
    r".*\.attn\.(masked_)?bias",
    r".*\.masked_bias",
)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The dims that the table's letters stand for."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "O": 1,
    }


def row_of(path: str) -> Row:
    """The row of a parameter's path.

    Raises:
      KeyError: the table has none.
    """
    for row in LLAMA:
        if row.path == path:
            return row
    raise KeyError(f"no Hugging Face name for the parameter {path}: add a row to jaxalign.models.hf_names")


def find(name: str) -> tuple[Row, int | None] | None:
    """The row and the layer of a Hugging Face name, or None where the table does not know it.

    >>> row, layer = find("model.layers.3.mlp.up_proj.weight")
    >>> row.path, layer
    ('layers/mlp/up/kernel', 3)
    """
    for row in LLAMA:
        match = row.pattern().fullmatch(name)
        if match:
            return row, int(match["layer"]) if row.stacked else None
    return None


def is_harmless(name: str) -> bool:
    """Whether a key of an old file may be left unread.

    >>> is_harmless("model.layers.0.self_attn.rotary_emb.inv_freq")
    True
    """
    return any(re.fullmatch(pattern, name) for pattern in HARMLESS)
