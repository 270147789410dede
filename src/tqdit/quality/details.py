"""Measure what a report shows beside the figures of a comparison: single sites, and maxima after softmax."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tqdit.architectures.attention import Computed
from tqdit.architectures.registry import conditions, config_of, graph
from tqdit.calibration.taps import Taps
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.graph import Attention
from tqdit.quality.saved import Details, SiteErrors, maxima_boxes
from tqdit.quality.site_errors import measured_sites, sampled_states
from tqdit.sources.conditions import hash_of
from tqdit.stages import Report
from tqdit.timegroups import TimeGroups

if TYPE_CHECKING:
    from tqdit.imaging.images import Images
    from tqdit.quality.artifacts import ComparedArtifact

BATCH = 16
MAXIMA_PER_HEAD = 16  # columns of attention, spread over the keys


def of_samples(
    model: nn.Module,
    found: Sequence["ComparedArtifact"],
    wanted: "Images",
    data: CalibrationSet,
    digest: str,
    report: Report,
) -> Details:
    """Return the details of a comparison on samples. `data`: the held-out states; `digest`: of the float weights."""
    structure, states = graph(config_of(model)), sampled_states(model, data)
    sites = []
    for entry in found:
        measured = measured_sites(model, structure, entry.solution, states, report, f"sites of {entry.name}")
        sites.append(SiteErrors(tuple(measured[0]), measured[1]))
    groups = data.time_groups
    finest = max((entry.solution.time_groups for entry in found), key=lambda g: g.num_groups, default=groups)
    maxima = softmax_maxima(model, data)
    boxes = maxima_boxes(maxima, data.t, _shown(finest, groups)) if maxima is not None else []
    names = wanted.source.labels if wanted.conditions is None else {}
    captions = [names.get(label, "") for label in wanted.labels]
    conditions_hash = hash_of(wanted.source.config, wanted.conditions)
    return Details(digest, conditions_hash, (groups.low, groups.high), tuple(sites), tuple(boxes), tuple(captions))


def _shown(finest: TimeGroups, drawn: TimeGroups) -> TimeGroups:
    """Return the ranges of boxes: the finest time groups of any artifact, unless the states are too few for them."""
    return finest if 1 < finest.num_groups <= drawn.num_groups else drawn


@torch.no_grad()
def softmax_maxima(model: nn.Module, data: CalibrationSet) -> torch.Tensor | None:
    """Return the largest probability of columns of self-attention, fp32 (S, blocks, C) on the CPU; None without any.

    These are the values of the paper's Fig. 3, of the float model at every state.
    """
    blocks, taps, found = graph(config_of(model)).blocks, Taps(), []
    if not any(attention for block in blocks for attention in block.attentions if not attention.context):
        return None
    device = next(iter(model.parameters())).device
    with taps.attached(model, blocks):
        for start in range(0, len(data), BATCH):
            sink = _Largest()
            x, t, labels = (part[start : start + BATCH].to(device) for part in (data.x, data.t, data.labels))
            inputs = (data.conditions or conditions(config_of(model))).rows(labels)
            with taps.sending_to(sink):
                model(x, timestep=t, **inputs, return_dict=False)
            found.append(torch.stack(sink.maxima, 1))
    return torch.cat(found)


class _Largest:
    """A sink that keeps the largest probability of some columns of every self-attention."""

    def __init__(self) -> None:
        self.maxima: list[torch.Tensor] = []

    def linear_input(self, *_: Any) -> None:
        """Keep nothing of linear layers."""

    def linear_output(self, *_: Any) -> None:
        """Keep nothing of linear layers."""

    def attention(self, attention: Attention, computed: Computed) -> None:
        if attention.context:
            return
        columns = computed.probabilities.amax(2)  # over queries: (B, H, M)
        stride = max(1, columns.shape[-1] // MAXIMA_PER_HEAD)
        self.maxima.append(columns[..., ::stride][..., :MAXIMA_PER_HEAD].flatten(1).float().cpu())
