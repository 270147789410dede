"""Check that the conditions that a user gives suit the model: classes of its own, or prompts."""

from collections.abc import Mapping
from typing import Any

import torch

from tqdit.architectures.registry import CLASS_NAME, architecture, conditions, graph
from tqdit.errors import InputError
from tqdit.sampling.guidance import ClassLabels, Conditions, conditions_sha256
from tqdit.sampling.prompts import Prompts
from tqdit.system import trees


def is_prompted(config: Mapping[str, Any]) -> bool:
    """Say whether a config's model attends to the tokens of a prompt."""
    return any(attention.context for block in graph(config).blocks for attention in block.attentions)


def suitable(config: Mapping[str, Any], given: Conditions | None = None) -> Conditions:
    """Return the conditions under which a config's model is sampled: the given ones, or the model's own classes.

    Raises `InputError` for a model of prompts without any, for prompts that a model has no use for, and for prompts of
    another width.
    """
    name, prompted = config[CLASS_NAME], is_prompted(config)
    if given is None:
        return conditions(config)
    if isinstance(given, Prompts) and not prompted:
        raise InputError(f"a {name} is sampled under classes; it has no use for prompts")
    if isinstance(given, Prompts):
        _check_fit(config, given)
    return given


def hash_of(config: Mapping[str, Any], given: Conditions | None) -> str | None:
    """Return the sha256 of the conditions of a calibration, or None if they are the classes of a config's model."""
    if given is None or (isinstance(given, ClassLabels) and given == architecture(config).conditions(config)):
        return None
    return conditions_sha256(given)


def _check_fit(config: Mapping[str, Any], given: Prompts) -> None:
    """Raise `InputError` for prompts with a tensor too few or too many, or of another width than the model's."""
    expected = trees.tensors(trees.flatten(architecture(config).example(config, 2)))
    found = trees.tensors(trees.flatten(given.rows(torch.zeros(1, dtype=torch.int64))))
    for path in sorted(expected.keys() ^ found.keys()):
        what = "lack" if path in expected else "have a tensor for"
        raise InputError(f"the prompts {what} '{path[-1]}', which a model of this config {_needs(path in expected)}")
    for path, tensor in expected.items():
        if tensor.is_floating_point() and tensor.shape[-1] != found[path].shape[-1]:
            raise InputError(
                f"the prompts have {found[path].shape[-1]} channels in '{path[-1]}', the model takes {tensor.shape[-1]}"
            )


def _needs(needed: bool) -> str:
    return "needs" if needed else "does not take"
