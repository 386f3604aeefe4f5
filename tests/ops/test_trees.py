"""Two trees of parameters joined by path."""

import jax
import numpy as np
import pytest

from jaxalign.ops.trees import join, joined, split

WHOLE = {"embed": 1, "layers": {"attention": {"q": 2, "k": 3}, "mlp": {"up": 4}}, "norm": 5}


@pytest.mark.parametrize("chosen", [(), ("layers/attention/q",), ("embed", "layers/mlp/up"), ("all",)])
def test_split_and_join_give_the_same_leaves(chosen):
    trained, frozen = split(WHOLE, lambda path: path in chosen or "all" in chosen)
    assert join(trained, frozen, like=WHOLE) == join(frozen, trained) == WHOLE
    assert not set(map(id, jax.tree.leaves(trained))) & set(map(id, jax.tree.leaves(frozen)))
    assert len(jax.tree.leaves(trained)) == (5 if "all" in chosen else len(chosen))


def test_leaves_are_the_same_arrays():
    one, two = np.ones(2), np.ones(3)
    both = join({"a": {"x": one}}, {"a": {"y": two}})
    assert both["a"]["x"] is one and both["a"]["y"] is two
    assert joined({"policy": {"x": one}, "value": {"x": two}}, {"policy": {"y": two}, "ref": {"x": one}}) == {
        "policy": {"x": one, "y": two},
        "value": {"x": two},
    }


@pytest.mark.parametrize(
    ("trained", "frozen", "named"),
    [
        ({"layers": {"q": 1}}, {"layers": {"q": 1}}, "layers/q is both"),
        ({"layers": {"q": {"kernel": 1}}}, {"layers": {"q": 1}}, "layers/q is both"),
        ({"embed": 1, "norm": 5}, {"layers": WHOLE["layers"]["mlp"]}, "layers/attention/k is in neither"),
        (WHOLE, {"layers": {"bias": 1}}, "layers/bias is no parameter"),
    ],
)
def test_a_leaf_of_both_or_of_neither_is_named(trained, frozen, named):
    with pytest.raises(ValueError, match=named):
        join(trained, frozen, like=WHOLE)
