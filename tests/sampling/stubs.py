"""Sampling runs of models that no architecture knows: their config has the keys of a DiT's."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tqdit.sampling.guidance import ClassLabels, Conditions, Sample, Sampling
from tqdit.sampling.trajectory import trajectory


def sample_of(config: Mapping[str, Any]) -> Sample:
    """What a sampling run has to know of a model with this config."""
    channels, side, patch = config["in_channels"], config["sample_size"], config.get("patch_size") or 1
    return Sample((channels, side, side), config.get("out_channels") or channels, (side // patch) ** 2)


def run(
    model: Any,
    scheduler: Mapping[str, Any] | None,
    sampling: Sampling,
    labels: torch.Tensor,
    generators: list[torch.Generator],
    conditions: Conditions | None = None,
) -> Iterator[tuple[float | None, torch.Tensor]]:
    """`trajectory` of a model under its classes, or other conditions."""
    classes = conditions or ClassLabels(model.config["num_embeds_ada_norm"])
    return trajectory(model, scheduler, sampling, labels, generators, classes, sample_of(model.config))
