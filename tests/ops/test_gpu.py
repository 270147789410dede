"""The reference on a GPU: the same codes and accumulators as on the CPU, for aligned and odd shapes."""

from collections.abc import Callable

import pytest
import torch

from tqdit.ops.reference import int_matmul
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.spec import Solution

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((64, 192), (192, 768)),
        ((1, 7), (7, 5)),
        ((17, 1030), (1030, 8)),
        ((3, 33, 40), (40, 24)),
        ((2, 3, 9, 64), (2, 3, 64, 9)),
    ],
)
def test_accumulators_are_those_of_the_cpu(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    left, right = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in (a, b))
    assert torch.equal(int_matmul(left.cuda(), right.cuda()).cpu(), int_matmul(left, right))
    extreme = torch.full(a, -128, dtype=torch.int8), torch.full(b, -128, dtype=torch.int8)
    assert torch.equal(int_matmul(extreme[0].cuda(), extreme[1].cuda()).cpu(), int_matmul(*extreme))


@pytest.mark.parametrize("preset", ["paper", "plus"])
def test_model_agrees_with_the_cpu(
    solved: Callable[..., Solution], model_inputs: dict[str, torch.Tensor], preset: str
) -> None:
    """Float epilogues and softmax differ in the last bits between devices, which moves few codes by one step."""
    model = convert(solved(preset, "w8a8"), "reference")
    with torch.inference_mode():
        expected = model(**model_inputs).sample
        actual = model.cuda()(**{name: x.cuda() for name, x in model_inputs.items()}).sample.cpu()
    assert sqnr_db(expected, actual) > 45
