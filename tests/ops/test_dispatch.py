"""Backends by name, and what each site's kernel is called."""

import pytest

from tqdit.errors import InputError
from tqdit.ops.dispatch import BACKENDS, get_backend, kernel_name
from tqdit.spec import Grid, Role, SiteSpec


def test_auto_is_an_integer_backend() -> None:
    assert get_backend("auto").INTEGER
    assert get_backend().NAME in BACKENDS


def test_simulated_says_that_it_is_not_integer() -> None:
    assert not get_backend("simulated").INTEGER


def test_every_backend_has_every_operation() -> None:
    for name in BACKENDS:
        backend = get_backend(name)
        assert name == backend.NAME
        for operation in ("quantize", "linear", "scores", "values", "weight_only_linear"):
            assert callable(getattr(backend, operation))


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'tpu'; known: auto, .*reference"):
        get_backend("tpu")


@pytest.mark.parametrize(
    ("role", "grid", "backend", "kernel"),
    [
        (Role.INPUT, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.WEIGHT, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.GELU, Grid.MRQ_GELU, "reference", "reference.linear[int8, 2 products]"),
        (Role.GELU, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.KEY, Grid.UNIFORM, "reference", "reference.scores[int8]"),
        (Role.SOFTMAX, Grid.MRQ_SOFTMAX, "reference", "reference.values[int8, 2 products]"),
        (Role.WEIGHT_ONLY, Grid.UNIFORM, "reference", "reference.weight_only_linear[float32 x int8]"),
        (Role.SOFTMAX, Grid.MRQ_SOFTMAX, "simulated", "simulated.values[float32]"),
    ],
)
def test_kernel_names(role: Role, grid: Grid, backend: str, kernel: str) -> None:
    assert kernel_name(SiteSpec("s", role, 8, grid), get_backend(backend)) == kernel
