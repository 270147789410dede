"""`ActivationParams`: the parameters of one activation site for every time group."""

import torch

from tqdit.layers.call import Call
from tqdit.ops.holders import FixedDtype
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import operand
from tqdit.spec import GridParams


class ActivationParams(FixedDtype):
    """The parameter table of one activation site, fp32 (time groups, units, COLUMNS), and its channel factors."""

    table: torch.Tensor
    channels: torch.Tensor | None

    def __init__(self, params: GridParams) -> None:
        super().__init__()
        self.spec = params.spec
        made = operand(params)
        self.merged = made.merged
        self.keep("table", made.table)
        self.keep("channels", made.channels)

    def operand(self, call: Call | None) -> OperandParams:
        """Return the site as an operand of a call, with the time groups of its samples.

        The operand's `group` is None if the site has one group.
        """
        spec = self.spec
        if spec.groups == 1:
            return OperandParams(spec.grid, spec.bits, self.table, self.merged, channels=self.channels)
        assert call is not None, f"site '{spec.name}' has time groups"
        # `shared` would be a constant to a compiler, which would compile anew for every group.
        shared = None if torch.compiler.is_compiling() else call.shared
        return OperandParams(spec.grid, spec.bits, self.table, self.merged, call.group, shared, self.channels)
