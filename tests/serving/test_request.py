"""The values of a form become a request, or a message that names the field."""

import math

import pytest

from tqdit.errors import InputError
from tqdit.sampling.guidance import Sampling
from tqdit.serving.request import Request

GOOD = {"condition": 3, "seed": 0, "steps": 50, "guidance": 1.5, "sampler": "auto"}


@pytest.mark.parametrize(
    ("seed", "steps", "guidance"), [(5, 10, 2), (5.0, 10.0, 2.0), ("5", "10", "2"), (" 5 ", "1e1", "2.0")]
)
def test_numbers_of_a_form_may_be_floats_and_texts(seed, steps, guidance) -> None:
    found = Request.read("sneaker", seed, steps, guidance, "ddim")
    assert found == Request("sneaker", 5, Sampling("ddim", 10, 2.0))
    assert type(found.seed) is type(found.sampling.steps) is int


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1.5, "seed must be a whole number, got 1.5"),
        ("seed", None, "seed must be a whole number, got nothing"),
        ("seed", "", "seed must be a whole number, got nothing"),
        ("seed", "seven", "seed must be a whole number, got 'seven'"),
        ("seed", True, "seed must be a whole number, got True"),
        ("seed", -1, "seed must be a whole number from 0 to 2147483647, got -1"),
        ("seed", 2**31, "seed must be a whole number from 0 to 2147483647, got 2147483648"),
        ("seed", "9" * 5000, "seed must be a whole number, got '999"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("steps", math.nan, "steps must be a whole number, got nan"),
        ("steps", math.inf, "steps must be a whole number, got inf"),
        ("steps", [1], "steps must be a whole number, got [1]"),
        ("guidance", None, "guidance must be a number, got nothing"),
        ("guidance", "much", "guidance must be a number, got 'much'"),
        ("guidance", math.nan, "guidance must be a finite number from 0, got nan"),
        ("guidance", -0.5, "guidance must be a finite number from 0, got -0.5"),
        ("sampler", "euler", "unknown sampler 'euler'; known: auto, ddim, ddpm, flow"),
        ("sampler", None, "unknown sampler 'None'"),
        ("condition", None, "say what to draw first"),
        ("condition", "", "say what to draw first"),
        ("condition", [3], "say what to draw first"),
    ],
)
def test_a_wrong_value_gets_a_message(field: str, value, message: str) -> None:
    with pytest.raises(InputError) as error:
        Request.read(**GOOD | {field: value})
    assert str(error.value).startswith(message)
