"""Value types that every floor shares: what a site is, which grid it has, and a solved model."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from tqdit.provenance import Provenance
from tqdit.timegroups import TimeGroups

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class IntFormat:
    """Two's-complement integers of `bits` bits; all our codes are signed and fit int8.

    The paper writes unsigned codes 0..2^k-1. Ours are the same grid with codes and zero point shifted down by
    2^(k-1): integer matrix units take signed operands, and x - z is unchanged.
    """

    bits: int

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1


class Role(StrEnum):
    """Which operand of which matmul a site is."""

    WEIGHT = "weight"  # of a matmul whose input is quantized too
    WEIGHT_ONLY = "weight_only"  # of a layer that runs on float activations
    INPUT = "input"  # of a linear layer
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SOFTMAX = "softmax"  # left operand of P V
    GELU = "gelu"  # input of the second feed-forward layer


class Grid(StrEnum):
    UNIFORM = "uniform"
    MRQ_SOFTMAX = "mrq_softmax"
    MRQ_GELU = "mrq_gelu"

    @property
    def two_region(self) -> bool:
        return self is not Grid.UNIFORM


class Granularity(StrEnum):
    """What one scale is shared by."""

    PER_TENSOR = "per_tensor"  # () beside the group axis
    PER_CHANNEL = "per_channel"  # (out,) of a weight
    PER_HEAD = "per_head"  # (H,) of an attention operand


@dataclass(frozen=True)
class SiteSpec:
    """One quantized operand. `groups` is the number of time groups its parameters have (1: none).

    `units` is the length of the granularity axis: output channels, heads, or 1.
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
        return IntFormat(self.bits)

    @property
    def is_weight(self) -> bool:
        return self.role in (Role.WEIGHT, Role.WEIGHT_ONLY)


@dataclass(frozen=True)
class GridParams:
    """Solved parameters of one site, always fp32 scales and int32 zero points.

    Uniform: x = scale * (code - zero_point). `scale`, `zero_point`: (groups, units).
    Two-region (MRQ): `scale` (groups, units, 2) = (s1, s2), `zero_point` None.
    """

    spec: SiteSpec
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """A quantized model as data: what one artifact holds, and what every runtime is built from.

    `codes` are int8 weight codes in the shape of the weight; `floats` the parameters left in fp32 (biases, label
    table).
    """

    model_config: Mapping[str, Any]
    time_groups: TimeGroups
    params: Mapping[str, GridParams]
    codes: Mapping[str, torch.Tensor]
    floats: Mapping[str, torch.Tensor]
    provenance: Provenance

    @property
    def sites(self) -> tuple[SiteSpec, ...]:
        return tuple(p.spec for p in self.params.values())
