"""The documentation site: it builds without a warning, reads without a network, and has what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tqdit

ROOT = Path(__file__).resolve().parent.parent
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"'\s>]+)|<link\b[^>]*>""")
FROM_STYLES = re.compile(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; needs the extra `docs`, which `dev` has."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def hosts(page: str) -> list[str]:
    """Return what a page loads from another host."""
    found = []
    for match in LOADED.finditer(page):
        address = match[1] or (re.search(r"""\bhref=["']?([^"'\s>]+)""", match[0]) or ["", ""])[1]
        if re.match(r"(?:https?:)?//", address) and 'rel="canonical"' not in match[0]:
            found.append(address)
    return found


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    assert {path.name: hosts(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")} == {
        path.name: [] for path in site.rglob("*.html")
    }
    assert [FROM_STYLES.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.css")].count([]) == len(
        list(site.rglob("*.css"))
    )


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="https://a.example/b.js"></script>', ["https://a.example/b.js"]),
        ('<link rel="stylesheet" href="//a.example/b.css">', ["//a.example/b.css"]),
        ('<script src="assets/b.js"></script><a href="https://a.example">a link</a>', []),
    ],
)
def test_what_is_loaded_from_another_host_is_seen(page: str, found: list[str]) -> None:
    assert hosts(page) == found


def test_equations_are_mathml(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math") == (ROOT / "docs" / "method.md").read_text(encoding="utf-8").count("```math")
    assert "```math" not in page
    assert page.count("<math") >= 8


def test_every_public_name_has_its_signature_and_text(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in tqdit.__all__ if f'id="tqdit.{name}"' not in page] == []


def test_every_entry_of_the_navigation_is_a_page(site: Path) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = [page for room in nav for part in room.values() for entry in part for page in entry.values()]
    assert len(entries) > 20
    assert [entry for entry in entries if not (site / entry).with_suffix(".html").is_file()] == []
