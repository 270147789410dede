"""The grids of this package by name.

Another grid is a subclass of `Grid`, made known by `register`.
"""

from tqdit.grids.kind import Columns, Grid, known, register
from tqdit.grids.mrq_gelu import MrqGelu
from tqdit.grids.mrq_softmax import MrqSoftmax
from tqdit.grids.row import Row
from tqdit.grids.softmax_row import SoftmaxRow
from tqdit.grids.uniform import Uniform

__all__ = ["Columns", "Grid", "known", "register"]

Grid.UNIFORM = register(Uniform("uniform"))
Grid.ROW = register(Row("row"))
Grid.SOFTMAX_ROW = register(SoftmaxRow("softmax_row"))
Grid.MRQ_SOFTMAX = register(MrqSoftmax("mrq_softmax"))
Grid.MRQ_GELU = register(MrqGelu("mrq_gelu"))
