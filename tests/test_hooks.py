"""`system.hooks`: the hooks of a piece of work go when it ends, however it ends."""

from typing import Any

import pytest
import torch
from torch import nn

from tqdit.system.hooks import hooks


def count(layer: nn.Module) -> int:
    return len(layer._forward_hooks) + len(layer._forward_pre_hooks)


def test_hooks_run_until_the_work_ends() -> None:
    first, second, seen = nn.Linear(2, 2), nn.Linear(2, 2), list[str]()
    own = second.register_forward_hook(lambda *_: seen.append("own"))
    with hooks() as keep:
        keep(first.register_forward_hook(lambda *_: seen.append("after")))
        keep(second.register_forward_pre_hook(lambda *_: seen.append("before")))
        second(first(torch.zeros(1, 2)))
    assert seen == ["after", "before", "own"]
    second(first(torch.zeros(1, 2)))
    assert seen == ["after", "before", "own", "own"], "hooks of others stay"
    own.remove()


def test_hooks_go_when_the_work_fails() -> None:
    layer = nn.Linear(2, 2)

    def work(*modules: Any) -> None:
        with hooks() as keep:
            for module in modules:
                keep(module.register_forward_pre_hook(print))
            raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        work(layer, layer)
    with pytest.raises(AttributeError, match="register_forward_pre_hook"):
        work(layer, None)  # a hook cannot even be registered
    assert count(layer) == 0
