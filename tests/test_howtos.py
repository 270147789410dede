"""The how-to pages: their code runs as it stands in them."""

from pathlib import Path

import pytest

from howtos import DOCS, blocks, module
from tqdit.architectures import registry
from tqdit.ops import dispatch

PAGES = {"add-an-architecture.md": ("patchformer", "patchformer_int8"), "add-a-backend.md": ("exact64",)}


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten after it."""
    monkeypatch.setattr(registry, "_LOCATIONS", dict(registry._LOCATIONS))
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))


def test_pages_are_short() -> None:
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert text.count("\n") <= 200, page
        assert max(map(len, text.splitlines())) <= 120, page


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions compare the result with the float model or with the reference."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "howto"}
    made = []
    for name, code in blocks(page):
        if name is None:
            exec(code, namespace)
        elif not name.startswith("test_"):  # tests/backends runs these
            made.append(module(name, code).__name__)
    assert tuple(made) == PAGES[page]
