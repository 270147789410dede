"""The grids of this package by name.

Another grid is a subclass of `Grid`, made known by `register`.
"""

from tqdit.grids.kind import Columns, Grid, known, register
from tqdit.grids.mrq_gelu import MrqGelu
from tqdit.grids.mrq_softmax import MrqSoftmax
from tqdit.grids.uniform import Uniform

__all__ = ["Columns", "Grid", "known", "register"]

Grid.UNIFORM = register(Uniform("uniform"))
Grid.MRQ_SOFTMAX = register(MrqSoftmax("mrq_softmax"))
Grid.MRQ_GELU = register(MrqGelu("mrq_gelu"))
