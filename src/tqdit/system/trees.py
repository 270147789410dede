"""Handle nested dictionaries of tensors, such as a model's keyword arguments: flatten, rebuild and map them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

Path = tuple[str, ...]  # the keys that lead to a leaf, outermost first


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Return every leaf by its path.

    A value that is no mapping is a leaf, and so is an empty mapping.
    """
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            flat[(key,)] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Return the nested dictionary that `flatten` made flat."""
    tree: dict[str, Any] = {}
    for (*outer, name), leaf in flat.items():
        place = tree
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = leaf
    return tree


def tensors(flat: Mapping[Path, Any]) -> dict[Path, torch.Tensor]:
    """Return the leaves that are tensors."""
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, torch.Tensor)}


def mapped(function: Callable[..., torch.Tensor], *trees: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a function to the tensors of every path; other leaves stay those of the first tree.

    Raises `ValueError` naming the path at which one tree has a tensor and another has none.
    """
    first, *others = (flatten(tree) for tree in trees)
    for other in others:
        if differing := tensors(first).keys() ^ tensors(other).keys():
            raise ValueError(f"'{'.'.join(min(differing))}' is a tensor in one of the trees alone")
    return unflatten(
        {
            path: function(leaf, *(other[path] for other in others)) if isinstance(leaf, torch.Tensor) else leaf
            for path, leaf in first.items()
        }
    )
