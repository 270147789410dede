"""What the pages say: figures of the committed result files, links, modules and floors that there are."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tqdit.cli.main import COMMANDS
from tqdit.recipe import METHOD_SETTINGS, PRESETS, Recipe

ROOT = Path(__file__).resolve().parent.parent


def test_figures_in_docs_come_from_the_result_files() -> None:
    command = [sys.executable, ROOT / "bench" / "make_results.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["concept_figures.py", "gains.py"])
def test_figures_are_those_that_the_scripts_draw(script: str) -> None:
    command = [sys.executable, ROOT / "bench" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_is_short() -> None:
    """It has one table of figures, of at most ten rows, each with a link to where they were measured."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(f"<!-- {word}")) for word in ("res", "end"))
    rows = [line for line in lines[start:end] if line.startswith("| ")][2:]
    assert 0 < len(rows) <= 10
    assert all("](docs/" in row for row in rows)


def test_the_page_of_settings_has_every_setting_and_value() -> None:
    """Each setting has one row: its legal values, then its value in both presets or the only default."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(cells[0].strip("`") for cells in rows) == sorted(Recipe.model_fields)
    for name, legal, _, *values in ((cells[0].strip("`"), *cells[1:]) for cells in rows):
        choices = get_args(Recipe.model_fields[name].annotation)
        words = [word for word in choices if isinstance(word, str)]
        assert re.findall(r"`(\w+)`", legal) == words or not words, name
        if name in METHOD_SETTINGS:
            assert [value.strip("`") for value in values] == [str(getattr(Recipe(p), name)) for p in PRESETS], name
        elif values and values != ["–"]:
            assert values[0].strip("`") == str(getattr(Recipe(), name)), name


def test_local_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        links = [part.split(")")[0] for part in text.split("](")[1:]]
        for link in links:
            assert link.startswith("http") or (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    """`make docs` checks that the entries exist."""
    entries = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    found = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert found - entries <= {"evaluation.md", "report.md", "serve.md"}


def test_the_page_of_commands_has_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    names = {command.__name__ for command in COMMANDS}
    assert {name for name in names if f"| `tqdit {name}` |" not in page} <= {"report", "serve"}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "src" / "tqdit"
STARTS = (ROOT, ROOT / "tests", PACKAGE, PACKAGE / "backends", PACKAGE / "backends" / "triton")  # of paths in pages
OTHERS = {"tqdit.json", "tqdit.manifest"}  # a file and a tensor of an artifact
QUOTED_PATH = re.compile(r"`((?:[\w.-]+/)*(?:[\w-]+\.py)?)`")  # of a Python file or a folder
DOTTED = re.compile(r"(?<![\w/.-])tqdit(?:\.\w+)+")
IN_A_ROOM = re.compile(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*\))?`")


def lacking(text: str) -> set[str]:
    """Paths of Python files and dotted names of the package that a text has and that do not exist."""
    paths = {path for line in text.splitlines() for path in _missing_paths(line)}
    names = {name for name in DOTTED.findall(text) if name not in OTHERS}
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    inside = (name for name in IN_A_ROOM.findall(text) if not name.endswith(".py"))
    names |= {f"tqdit.{name}" for name in inside if name.split(".")[0] in rooms}
    return paths | {name for name in names if not _exists(name)}


def _missing_paths(line: str) -> Iterator[str]:
    """A name without a folder may be in the folder that the line has named before."""
    folder = ""
    for path in QUOTED_PATH.findall(line):
        if "/" in path:
            folder = path.rpartition("/")[0]
        ways = (way for start in STARTS for way in (start / path, start / folder / path))
        if path.endswith(".py") and not any(way.is_file() for way in ways):
            yield path


def _exists(name: str) -> bool:
    """Whether a dotted name leads to a module or to an attribute of one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    assert not lacking(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`ops/reference.py` and `tqdit.load`, beside `tqdit.json`", set()),
        ("`layers/sundial.py`", {"layers/sundial.py"}),
        ("`layers/block.py`, `params.py`, `backends/triton/`: `launch.py`", set()),
        ("`layers/block.py`, `solver.py`\n`params.py`", {"solver.py", "params.py"}),
        ("tqdit.ops.reference.int_matmul, tqdit.models.sites", {"tqdit.models.sites"}),
        ("`ops.reference.product(x)`, `ops.tables`", {"tqdit.ops.reference.product"}),
    ],
)
def test_names_that_are_missing(text: str, missing: set[str]) -> None:
    assert lacking(text) == missing


def test_the_architecture_page_has_every_room_and_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    top = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {room for room in rooms if f"`{room}/`" not in page} == set()
    assert {name for name in top if f"`{name}`" not in page} == set()
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = contract["contracts"][0]["layers"]
    rows = [row for row in page.splitlines() if re.match(r"\| \d+ \|", row)]
    assert len(rows) == len(floors)
    for floor, row in zip(floors, rows, strict=True):
        assert set(re.findall(r"tqdit\.(\w+)", floor)) == set(re.findall(r"`(\w+)(?:/|\.py)?`", row.split("|")[2]))
