"""The how-to pages: their code runs as it stands in them."""

from pathlib import Path

import pytest

from howtos import DOCS, blocks, module
from tqdit.architectures import registry
from tqdit.errors import InputError
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
        assert text.count("\n") <= 210, page
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


def test_an_architecture_need_not_have_published_shapes() -> None:
    """The page's architecture has names and keys of shapes by the interface's defaults."""
    made = [module(name, code) for name, code in blocks("add-an-architecture.md") if name]
    registry.register("PatchFormer", "patchformer_int8:ARCHITECTURE")
    known, config = registry.architecture("PatchFormer"), registry.config_of(made[0].PatchFormer())
    assert known.shape_names() == ()
    assert known.shape_name(config) == "PatchFormer 2x16"
    assert known.shape_key(config) == known.shape_key(dict(config))
    assert known.shape_key(config) != known.shape_key({**config, "num_layers": 3})
    with pytest.raises(InputError, match=r"unknown shape 'PatchFormer-B'; PatchFormer has no published shapes"):
        known.shape_config("PatchFormer-B")
    with pytest.raises(InputError, match=r"num_layers = 0; it must be a whole number"):
        known.check({**config, "num_layers": 0})
