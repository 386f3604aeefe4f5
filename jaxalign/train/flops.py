"""Model FLOPs of a training step against the hardware's peak (MFU)."""

from __future__ import annotations

from typing import Any

from jaxalign.parallel.hardware import of_kind


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, None where it is not in the table (a CPU).

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    found = of_kind(device_kind)
    return None if found is None else found.flops


def flops_per_token(config: Any, length: float, *, passes: float = 3.0) -> float:
    """Model FLOPs of one token, without what is recomputed.

        passes * (2 * matrix parameters + 4 * heads * head dim * sum over layers of mean visible keys)

    Source: Chowdhery et al. 2022 (PaLM), appendix B, which has passes = 3 (forward 1, backward 2) and the 6 N of
    Kaplan et al. 2020.  The token head counts as a matrix, the lookup of the embedding does not.

    Args:
      config: a ModelConfig.
      length: tokens of a sequence; half of them are visible on average, under a window W below it W - W^2 / (2 length).
      passes: 3 for a trained model; a live reference of the same size adds 1.
    """
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = attention + c.mlp_matrices * c.embed_dim * c.mlp_dim
    head = c.embed_dim * (c.num_labels or 1 if c.head == "score" else c.vocab_size)
    matrices = c.num_layers * layer + head
    nearest = [length if window is None else min(window, length) for window in c.windows or (None,) * c.num_layers]
    visible = sum(near - near * near / (2 * length) for near in nearest) if length else 0.0
    return passes * (2.0 * matrices + 4.0 * c.num_heads * c.head_dim * visible)
