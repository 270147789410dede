"""`ActivationParams`: the parameters of one activation site for every time group."""

import torch

from tqdit.grids.regions import merge_shift
from tqdit.layers.clock import TimestepClock
from tqdit.ops.holders import FixedDtype
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import parameter_table
from tqdit.spec import GridParams


class ActivationParams(FixedDtype):
    """Parameters of one activation site; `select` picks those of the batch's time groups."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    coarse: torch.Tensor
    shift: torch.Tensor | None
    table: torch.Tensor | None

    def __init__(self, params: GridParams, clock: TimestepClock, ndim: int, tables: bool = False) -> None:
        """`ndim`: of the tensor they apply to, (B, N, C) or (B, H, N, head_dim). `tables`: see `Backend.TABLES`."""
        super().__init__()
        self.spec = spec = params.spec
        self._clock = [clock]  # in a list: the model owns the clock, a site only reads it
        shape = (spec.groups, spec.units, 1, 1) if ndim == 4 else (spec.groups, 1, 1)
        two_region = spec.grid.two_region
        scale = params.scale[..., 0] if two_region else params.scale
        coarse = params.scale[..., 1] if two_region else torch.ones_like(scale)
        zero_point = torch.zeros_like(scale, dtype=torch.int32) if two_region else params.zero_point
        shift = merge_shift(scale, coarse, spec.bits, spec.grid) if two_region else None
        assert zero_point is not None
        self.keep("scale", scale.reshape(shape))
        self.keep("zero_point", zero_point.reshape(shape))
        self.keep("coarse", coarse.reshape(shape))
        self.keep("shift", None if shift is None else shift.reshape(shape))
        operand = OperandParams(spec.grid, spec.bits, self.scale, self.zero_point, self.coarse, self.shift)
        self.keep("table", parameter_table(operand) if tables else None, persistent=False)

    def select(self, plain: bool = False) -> OperandParams:
        """Parameters that broadcast to the batch: leading axis 1 (one group) or B; or the table of all groups.

        `plain`: without the table, whatever the backend.
        """
        spec, clock = self.spec, self._clock[0]
        if self.table is not None and not plain:
            group = clock.group if spec.groups > 1 else None
            given = self.scale, self.zero_point, self.coarse, self.shift
            return OperandParams(spec.grid, spec.bits, *given, table=self.table, group=group)
        tensors = [self.scale, self.zero_point, self.coarse, self.shift]
        if self.spec.groups > 1:
            assert clock.group is not None, "the clock is set by the model's forward"
            # A view, no copy; not when compiled, which would compile once for every group.
            if not torch.compiler.is_compiling() and clock.shared is not None:
                tensors = [None if t is None else t[clock.shared : clock.shared + 1] for t in tensors]
            else:
                tensors = [None if t is None else t.index_select(0, clock.group) for t in tensors]
        return OperandParams(self.spec.grid, self.spec.bits, *tensors)  # type: ignore[arg-type]
