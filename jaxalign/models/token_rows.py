"""Vectors of some tokens, trained beside a frozen table that has those of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops.embedding import lookup
from jaxalign.ops.trees import by_path, from_paths
from jaxalign.types import Params

EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"
ENDS = (EMBEDDING, HEAD)  # the tables: the parameters that have a vector for every token
_LEAF = "token_rows"


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Tokens whose vectors in a table are a parameter of their own, [n, D], in the order of their ids.

    What the table has of them is not read, and stays as it was: roles that do not train them share it.
    """

    ranges: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # of ids, by table: first, one past the last

    @classmethod
    def of(cls, ids: Mapping[str, Iterable[int]]) -> TokenRows | None:
        """Those of some ids by table, in any order; None where there are none.

        >>> TokenRows.of({"embed/embedding": [5, 0, 1]})
        TokenRows(ranges=(('embed/embedding', ((0, 2), (5, 6))),))
        """
        found = []
        for table in ENDS:
            if len(own := np.unique(np.fromiter(ids.get(table, ()), np.int64))):
                ends = np.flatnonzero(np.diff(own) > 1)
                firsts, lasts = own[[0, *(ends + 1)]], own[[*ends, -1]]
                pairs = zip(firsts.tolist(), (lasts + 1).tolist(), strict=True)
                found.append((table, tuple(pairs)))
        return cls(tuple(found)) if found else None

    def ids(self, table: str) -> np.ndarray | None:
        """Of a table, ascending; None: all of its vectors lie in it.

        >>> TokenRows((("embed/embedding", ((0, 2), (5, 6))),)).ids("embed/embedding").tolist()
        [0, 1, 5]
        """
        found = dict(self.ranges).get(table)
        return None if found is None else np.concatenate([np.arange(*ends, dtype=np.int32) for ends in found])

    def looked_up(self, x: jax.Array, tokens: jax.Array, rows: jax.Array, size: int) -> jax.Array:
        """Tokens' vectors, of which some are these.

        Args:
          x: [B, T, D], as the table has them.
          tokens: int [B, T].
          rows: [n, D].
          size: of the vocabulary.
        """
        ids = self.ids(EMBEDDING)
        assert ids is not None
        places = np.full(size, len(ids), np.int32)
        places[ids] = np.arange(len(ids))
        place = jnp.take(places, tokens, mode="fill", fill_value=len(ids))
        there = place < len(ids)
        own = lookup(rows, jnp.where(there, place, 0), x.dtype)
        return jnp.where(there[..., None], own, x)

    def joined(self, path: str, table: Any, rows: Any) -> Any:
        """A table with these vectors in it, in its own dtype.

        Args:
          path: of the table.
          table: [V, D], or [D, V] of the head.
          rows: [n, D].
        """
        ids, rows = self.ids(path), rows.astype(table.dtype)
        unique = {"unique_indices": True, "indices_are_sorted": True}
        if path == EMBEDDING:
            return table.at[ids].set(rows, **unique)
        return table.at[:, ids].set(rows.T, **unique)

    def merged(self, ends: Params, dtype: Any = None) -> Params:
        """What is not a layer, with the tables whole again; the same where these vectors are not among them.

        Args:
          ends: a model's parameters without its layers.
          dtype: of the tables; None: as they are.
        """
        leaves = by_path(ends)
        for table, _ in self.ranges:
            if (rows := leaves.pop(leaf_of(table), None)) is not None:
                leaves[table] = self.joined(table, leaves[table].astype(dtype or leaves[table].dtype), rows)
        return from_paths(leaves)


def leaf_of(table: str) -> str:
    """The path of a table's vectors of some tokens.

    >>> leaf_of("lm_head/kernel")
    'lm_head/token_rows'
    """
    return f"{table.partition('/')[0]}/{_LEAF}"


def table_of(path: str) -> str | None:
    """The table beside which a parameter has vectors of some tokens; None: it is another parameter."""
    return next((table for table in ENDS if path == leaf_of(table)), None)


def has_rows(ends: Params) -> bool:
    """Whether what is not a layer holds vectors of some tokens."""
    return any(_LEAF in own for own in ends.values() if isinstance(own, dict))
