"""The kinds of grids.

Importing any module of this room registers all of them, as unpickling a `Grid` needs.
"""

from tqdit.grids.registry import Grid, register

__all__ = ["Grid", "register"]
