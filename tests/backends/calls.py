"""Operands of one call: those whose samples are in different time groups share the groups."""

from dataclasses import dataclass
from typing import Any

import torch
from operands import Maker

from tqdit.ops.schema import OperandParams


@dataclass
class CallMaker(Maker):
    """Draws like `Maker`; operands of a batch have more time groups than samples, each sample another one."""

    def params(self, *args: Any, **kwargs: Any) -> OperandParams:
        found = super().params(*args, **kwargs)
        return found if found.group is None else found._replace(group=torch.arange(len(found.group), 0, -1))


def maker(seed: int, bits: int = 8) -> CallMaker:
    return CallMaker(torch.Generator().manual_seed(seed), bits)
