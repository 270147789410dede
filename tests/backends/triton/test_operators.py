"""The operators in the forms that no DiT has, as torch checks them: schemas, shapes and dtypes without running."""

import functools
from typing import Any

import pytest
import torch
from layouts import padded, to
from operands import maker

pytest.importorskip("triton")

from tqdit.backends.triton import operators, tuning
from tqdit.backends.triton.backend import TritonBackend
from tqdit.ops.schema import Residual
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("project", "attend", "linear", "linear_residual")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """The name, the operator and the arguments of every call."""
    found: list[tuple[str, Any, tuple[Any, ...]]] = []
    for name in NAMES:

        def record(*args: Any, name: str, operator: Any) -> torch.Tensor:
            found.append((name, operator, args))
            return operator(*args)

        operator = getattr(operators, name)
        monkeypatch.setattr(operators, name, functools.partial(record, name=name, operator=operator))
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])
    return found


def test_new_forms_have_true_fake_implementations(called) -> None:
    run, make, batch, heads, width = TritonBackend(), maker(0), 2, 2, 20
    attention, target = to(DEVICE, make.attention(heads, Grid.MRQ_SOFTMAX, batch)), to(DEVICE, make.params(lead=batch))
    source = to(DEVICE, make.params(lead=batch))
    layers = [run.prepare(make.weight(parts * width, width), None).to(DEVICE) for parts in (1, 2)]
    x = make.values(batch, 5, width).to(DEVICE)
    codes = run.quantize(x, source)
    context = run.project(to(DEVICE, padded(make.codes(batch, 3, width))), source, layers[1], attention[1:3], heads)
    query = run.project(codes, source, layers[0], attention[:1], heads)
    bias = make.values(batch, 3).to(DEVICE)
    for added in (None, bias):
        attended = run.attend(query, attention, target, context, added)
    out = run.linear(attended, target, layers[0], Residual(x.bfloat16()))
    assert out.dtype is torch.bfloat16
    assert run.linear(attended, target, layers[1]).shape == (batch, 5, 2 * width)
    assert {name for name, *_ in called} == set(NAMES)
    for _, operator, args in called:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
