"""Choose the conditions under which models are timed: their classes, or random prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tqdit.architectures.registry import architecture, conditions
from tqdit.sampling.guidance import Conditions
from tqdit.sources.conditions import is_prompted
from tqdit.system import trees


@dataclass(frozen=True)
class RandomPrompt:
    """One random prompt for a config's model, and its unconditional one: the two halves of the model's `example`."""

    config: Mapping[str, Any]

    @property
    def count(self) -> int:
        return 1

    def rows(self, indices: torch.Tensor) -> dict[str, Any]:
        return self._half(0, len(indices), indices.device)

    def null(self, count: int, device: torch.device) -> dict[str, Any]:
        return self._half(1, count, device)

    def _half(self, half: int, count: int, device: torch.device) -> dict[str, Any]:
        both = architecture(self.config).example(self.config, 2)
        return trees.mapped(lambda x: x[half : half + 1].expand(count, *x.shape[1:]).to(device), both)


def timed_conditions(config: Mapping[str, Any]) -> Conditions:
    """Return the classes of a config's model, or a random prompt."""
    return RandomPrompt(config) if is_prompted(config) else conditions(config)
