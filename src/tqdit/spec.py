"""Define the value types that every other module shares: a site, the parameters of its grid, and a solved model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from tqdit.graph import Graph, Role
from tqdit.grids.formats import MAX_BITS, MIN_BITS, IntFormat  # noqa: F401  (legal bits of a site)
from tqdit.grids.registry import Grid
from tqdit.provenance import Provenance
from tqdit.timegroups import TimeGroups

STREAM_MARGIN = 8  # fp16 holds values this many times as large as the largest in calibration


class Granularity(StrEnum):
    """The elements of a tensor that share one scale."""

    PER_TENSOR = "per_tensor"  # shape () beside the group axis
    PER_CHANNEL = "per_channel"  # shape (out,), for a weight
    PER_HEAD = "per_head"  # shape (H,), for an attention operand


@dataclass(frozen=True)
class SiteSpec:
    """One quantized operand.

    `groups` is the number of time groups that its parameters have (1: none). `units` is the length of the granularity
    axis: output channels, heads, or 1.
    """

    name: str
    role: Role
    bits: int
    grid: Grid = Grid.UNIFORM
    granularity: Granularity = Granularity.PER_TENSOR
    groups: int = 1
    units: int = 1

    @property
    def format(self) -> IntFormat:
        """Return the integer format of the site's codes."""
        return IntFormat(self.bits)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the site's scales."""
        return self.grid.scale_shape(self.groups, self.units)

    @property
    def has_zero_point(self) -> bool:
        """Say whether the site has zero points: only an activation on a static grid of one region has."""
        return not self.is_weight and self.grid.zero_points

    @property
    def is_weight(self) -> bool:
        """Say whether the site is a weight."""
        return self.role in (Role.WEIGHT, Role.WEIGHT_ONLY)


@dataclass(frozen=True)
class GridParams:
    """The solved parameters of one site: fp32 scales and int32 zero points.

    Uniform: x = scale * (code - zero_point); `scale` and `zero_point` are (groups, units). Two-region (MRQ): `scale` is
    (groups, units, 2) = (s1, s2), and `zero_point` is None. Row: a row's scale is its largest magnitude times the
    fraction that `scale` holds, and `zero_point` is None.

    `channels` fp32 (C,): factors by which the channels of x are multiplied before x is coded; None is 1 for all. The
    weight that reads x has their inverses in its codes: W x = (W / channels) (channels x).

    `rotation`: the size of the Hadamard blocks by which channels are rotated after that, before x is coded (see
    `ops.rotation`); 0 is none. The weight's codes are those of the rotated weight.
    """

    spec: SiteSpec
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    rotation: int = 0

    @property
    def merged(self) -> bool:
        """Say whether a two-region site takes one product in every time group."""
        return self.spec.grid.merge_shift(self.scale, self.spec.bits) is not None


@dataclass(frozen=True)
class Solution:
    """A quantized model as data: an artifact holds it, and every runtime is built from it.

    `codes` are int8 weight codes in the shape of the weight. `floats` are the parameters left in fp32 (biases, label
    table). `stream_max`: the largest magnitude of the float model's residual stream in calibration; None where it was
    not recorded.

    `graph`: of a model whose graph was traced from a recorded call; None where the architecture of the model's class
    describes it. The floats of a traced model keep the dtype of the float model. `notes`: sentences about single sites,
    such as why a layer's inputs stay in float, by the name of the site.
    """

    model_config: Mapping[str, Any]
    time_groups: TimeGroups
    params: Mapping[str, GridParams]
    codes: Mapping[str, torch.Tensor]
    floats: Mapping[str, torch.Tensor]
    provenance: Provenance
    stream_max: float | None = None
    graph: Graph | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def fits_float16(self) -> bool:
        """Say whether fp16 holds the residual stream, with room for values that calibration did not see.

        Calibration sees the stream before and after blocks, in some states of the float model.
        """
        return self.stream_max is not None and self.stream_max * STREAM_MARGIN <= torch.finfo(torch.float16).max

    @property
    def sites(self) -> tuple[SiteSpec, ...]:
        """Return the sites in the order of their parameters."""
        return tuple(p.spec for p in self.params.values())
