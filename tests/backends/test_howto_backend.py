"""The backend of docs/add-a-backend.md, compared with the reference by the page's own test module."""

from collections.abc import Iterator

import pytest

from howtos import blocks, module
from tqdit.ops import dispatch

CODE = {name: code for name, code in blocks("add-a-backend.md") if name}
module("exact64", CODE["exact64"])
exec(CODE["test_exact64"], globals())


@pytest.fixture(autouse=True)
def _own_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the page registers is forgotten after each test."""
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    yield
    assert "exact64" in dispatch.BACKENDS
