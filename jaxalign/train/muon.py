"""Muon: momentum whose matrices are orthogonalised, for the layers' kernels; Adam for all else."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

_RMS = 0.2  # of an update, as Adam's mostly is: one learning rate serves both


def scale_by_muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Orthogonalised momentum for the kernels of the layers, Adam for embeddings, heads, norms and biases.

        m_t = b1 m_{t-1} + (1 - b1) g_t;   update = 0.2 sqrt(max(rows, columns)) NewtonSchulz(m_t with Nesterov)

    Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale, Liu et al. 2025 (arXiv 2502.16982,
    equation 4), by which learning rates and weight decay of AdamW carry over.

    Args:
      b1: momentum, and Adam's first decay.
      b2: Adam's second decay.
      eps: Adam's.
    """
    muon = optax.chain(contrib.scale_by_muon(beta=b1, weight_dimension_numbers=_sides), optax.stateless(_scaled))
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2, eps)}, _labels)


def _labels(params: Any) -> Any:
    def label(path, leaf) -> str:
        names = [key.key for key in path]
        return "muon" if names[0] == "layers" and names[-1] == "kernel" and leaf.ndim > 2 else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _sides(params: Any) -> Any:
    """Which axes of a kernel are a matrix's rows and columns; those before them (the layers) are matrices apart."""

    def sides(path, leaf) -> contrib.MuonDimensionNumbers:
        names, last = [key.key for key in path], leaf.ndim - 1
        if "attention" in names and names[-2] == "out":  # [L, N, H, D]
            return contrib.MuonDimensionNumbers(tuple(range(1, last)), (last,))
        if "attention" in names:  # [L, D, N, H]
            return contrib.MuonDimensionNumbers((1,), tuple(range(2, last + 1)))
        return contrib.MuonDimensionNumbers((last - 1,), (last,))

    return jax.tree_util.tree_map_with_path(sides, params)


def _scaled(updates: Any, params: Any = None) -> Any:
    del params

    def scaled(sides, update):
        rows, columns = (math.prod(update.shape[axis] for axis in axes) for axes in sides)
        return update * (_RMS * math.sqrt(max(rows, columns)))

    is_sides = lambda x: isinstance(x, contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(scaled, _sides(updates), updates, is_leaf=is_sides)
