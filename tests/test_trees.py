"""Nested dictionaries of tensors."""

import pytest
import torch

from tqdit.system.trees import flatten, mapped, tensors, unflatten

TREE = {"a": torch.ones(2), "b": {"c": torch.zeros(3), "d": None, "e": {"f": torch.full((1,), 4.0)}}, "g": {}, "h": 5}


def test_flat_and_back() -> None:
    flat = flatten(TREE)
    assert list(flat) == [("a",), ("b", "c"), ("b", "d"), ("b", "e", "f"), ("g",), ("h",)]
    assert list(tensors(flat)) == [("a",), ("b", "c"), ("b", "e", "f")]
    assert unflatten(flat) == TREE


def test_tensors_are_mapped_and_the_rest_is_kept() -> None:
    found = mapped(lambda x, y: x + y, TREE, TREE)
    assert found["b"]["e"]["f"].item() == 8
    assert found["a"].tolist() == [2, 2]
    assert (found["b"]["d"], found["g"], found["h"]) == (None, {}, 5)


@pytest.mark.parametrize("other", [{"a": torch.ones(2)}, {**TREE, "i": torch.ones(1)}, {**TREE, "a": None}])
def test_trees_of_other_tensors_are_an_error(other: dict) -> None:
    with pytest.raises(ValueError, match=r"'(a|b\.c|i)' is a tensor in one of the trees alone"):
        mapped(torch.add, TREE, other)
