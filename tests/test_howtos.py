"""The pages: their code runs as it stands in them, and the command line takes every command that they show."""

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from doc_worlds import WORLDS, small_recipes
from howtos import DOCS, ROOT, Block, all_blocks, blocks, module, of_tqdit, pages, python_blocks
from tqdit.architectures import registry
from tqdit.cli.main import app, main
from tqdit.errors import InputError
from tqdit.ops import dispatch
from tqdit.report import page as report_page
from tqdit.speed import cost
from tqdit.speed.memory_probe import Footprint

PAGES = {"add-an-architecture.md": ("patchformer", "patchformer_int8"), "add-a-backend.md": ("exact64",)}
# Commands that run as a page shows them. Others are parsed alone: they take processes of their own, or minutes.
EXECUTED = ("quantize", "sample", "inspect", "convert", "compare", "report")
ADDED = {"compare": ["--no-cost"]}  # time and memory
NOT_RUN: dict[str, int] = {}  # page -> blocks that cannot run, each with its reason in the page
SHELL_TOOLS = (".", "PYTHONPATH=tests/backends", "sed", "cd")  # of other commands: nothing to check


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page registers, and the number of threads that it sets, are forgotten after it."""
    monkeypatch.setattr(registry, "_LOCATIONS", dict(registry._LOCATIONS))
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def of(page: str) -> Path:
    return ROOT / page


@pytest.mark.parametrize("page", WORLDS)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks and cheap commands, in their order, in an empty folder with the stand-ins of the page.

    Memory, which is measured in processes of their own, is no part of them, and a report has the chart of one site.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "footprint", lambda request: Footprint(1_000_000, 3_000_000, None))
    monkeypatch.setattr(report_page, "TOP", 1)
    small_recipes(monkeypatch)
    namespace: dict[str, object] = {"__name__": "page"}
    for make in WORLDS[page]:
        namespace |= make(tmp_path, monkeypatch)
    ran = 0
    for block in all_blocks(of(page)):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(block.code(), namespace)
            ran += 1
        for command in block.commands():
            arguments = of_tqdit(command)
            if arguments and command[0] != "torchrun" and arguments[0] in EXECUTED and page != "docs/models.md":
                run_command(arguments, block, monkeypatch)
                ran += 1
    assert ran


def run_command(arguments: Sequence[str], block: Block, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", ["tqdit", *arguments, "-q", *ADDED.get(arguments[0], [])])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, f"{block.where}: tqdit {' '.join(arguments)}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    """The command line's own parser takes every command of tqdit; other commands name what there is."""
    for block in all_blocks(page):
        for command in block.commands():
            arguments = of_tqdit(command)
            try:
                parse(arguments) if arguments is not None else check_other(command)
            except Exception as error:
                pytest.fail(f"{block.where}: {' '.join(command)}: {error}")


def parse(arguments: Sequence[str]) -> None:
    """Raise the parser's error for an unknown command, option or argument."""
    group = get_command(app)
    if arguments[0].startswith("-"):
        assert arguments[0] in {name for parameter in group.params for name in parameter.opts} | {"--help"}
        return
    group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


def check_other(command: Sequence[str]) -> None:
    """Check that targets of make, files of Python and extras of the package exist."""
    tool, *rest = command
    if tool == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif tool in ("python", "python3") and not rest[0].startswith("-"):
        assert (ROOT / rest[0]).exists()
    elif tool == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(re.findall(r"\[(\w+)\]", " ".join(rest))) <= set(project["optional-dependencies"])
    else:
        assert tool in (*SHELL_TOOLS, "python", "python3")


@pytest.mark.parametrize(
    "words", ["quantize", "quantize a -o b --sample 8", "sample a -o b c", "nothing", "inspect a --json", "-x"]
)
def test_a_wrong_command_does_not_pass(words: str) -> None:
    with pytest.raises(Exception, match=r".*"):
        parse(words.split())


def test_every_python_block_runs_or_has_a_reason() -> None:
    """A page with Python code is run above or below; what cannot run is few, and counted."""
    skipped = {}
    for page in pages():
        name, found = page.relative_to(ROOT).as_posix(), python_blocks(page)
        reasons = [block.reason for block in found if block.reason is not None]
        if reasons:
            skipped[name] = len(reasons)
        run = name in WORLDS or page.name in PAGES
        assert run or len(reasons) == len(found), f"{name} has code that no test runs; add it to tests/doc_worlds.py"
    assert skipped == NOT_RUN


def test_a_page_in_the_list_has_code() -> None:
    assert [name for name in WORLDS if not list(all_blocks(of(name)))] == []
