"""Fixtures of the CPU backend in every way it can run."""

from collections.abc import Iterator

import pytest
from ways import WAYS, backend_that, forget

from tqdit.ops.composed import Composed


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    yield backend_that(request.param, monkeypatch)
    monkeypatch.undo()
    forget()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    """The best this machine can do."""
    yield backend_that("native", monkeypatch)
    monkeypatch.undo()
    forget()
