"""What is trained and what is frozen of a model: two trees of parameters, joined by path."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.types import Params


def join(trained: Params, frozen: Params, *, like: Params | None = None) -> Params:
    """One model's parameters from the two trees that hold them; the leaves are the same arrays.

    Args:
      trained: nested dicts.
      frozen: nested dicts with the other leaves, at paths of their own.
      like: a tree with every leaf that there should be, such as `Model.abstract()`; None leaves that to the model.

    Raises:
      ValueError: a leaf of both trees, or of `like` and of neither, or the reverse; with its path.

    >>> join({"q": {"kernel": 1}}, {"q": {"bias": 2}, "norm": 3})
    {'q': {'kernel': 1, 'bias': 2}, 'norm': 3}
    """
    whole = _join(trained, frozen, "")
    if like is not None:
        found, wanted = by_path(whole).keys(), by_path(like).keys()
        for path in sorted(found ^ wanted):
            where = "in neither tree" if path in wanted else "no parameter of the model"
            raise ValueError(f"{path} is {where}, trained or frozen")
    return whole


def split(params: Params, trains: Callable[[str], bool]) -> tuple[Params, Params]:
    """The trained and the frozen tree of a model's parameters; `join` puts them together again.

    Args:
      params: nested dicts.
      trains: whether the leaf at a path, "layers/attention/q/kernel", is trained.

    >>> split({"q": {"kernel": 1, "bias": 2}}, lambda path: path.endswith("kernel"))
    ({'q': {'kernel': 1}}, {'q': {'bias': 2}})
    """
    return _kept(params, trains, ""), _kept(params, lambda path: not trains(path), "")


def joined(params: Mapping[str, Params], frozen: Mapping[str, Params]) -> dict[str, Params]:
    """The whole parameters of each trained role: joined with the frozen tree of that role, where it has one."""
    return {role: join(own, frozen[role]) if role in frozen else own for role, own in params.items()}


def path_pattern(pattern: str) -> re.Pattern:
    """A regular expression of whole names of a path: "mlp", "layers/.*norm".

    >>> [bool(path_pattern("mlp").search(path)) for path in ("layers/mlp/up/kernel", "layers/mlp_norm/scale")]
    [True, False]
    """
    return re.compile(rf"(?:^|/)(?:{pattern})(?:/|$)")


def by_path(tree: Params, at: str = "") -> dict[str, Any]:
    """The leaves of a tree by their paths.

    >>> by_path({"q": {"kernel": 1}, "norm": 3})
    {'q/kernel': 1, 'norm': 3}
    """
    found: dict[str, Any] = {}
    for name, own in tree.items():
        found |= by_path(own, f"{at}{name}/") if isinstance(own, dict) else {at + name: own}
    return found


def from_paths(leaves: Mapping[str, Any]) -> Params:
    """The tree of `by_path`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _join(trained, frozen, at: str):
    if not (isinstance(trained, dict) and isinstance(frozen, dict)):
        raise ValueError(f"{at.removesuffix('/')} is both trained and frozen")
    both = dict(trained)
    for name, own in frozen.items():
        both[name] = _join(both[name], own, f"{at}{name}/") if name in both else own
    return both


def _kept(tree, keep, at: str):
    found = {}
    for name, own in tree.items():
        if isinstance(own, dict):
            if inner := _kept(own, keep, f"{at}{name}/"):
                found[name] = inner
        elif keep(at + name):
            found[name] = own
    return found
