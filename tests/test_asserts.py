"""A test that cannot fail is not a test: every test function asserts something, itself or by a helper that does."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).resolve().parent.rglob("*.py"))
CHECKS = {"raises", "warns", "fail", "deprecated_call"}  # of pytest


def asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Whether there is an `assert`, a `pytest.raises` or the like, or a call of one of the `helpers`."""
    nodes = list(ast.walk(function))
    return any(isinstance(node, ast.Assert) or _called(node) in CHECKS | helpers for node in nodes)


def helpers_among(functions: Iterable[ast.FunctionDef], known: set[str]) -> set[str]:
    """`known` and the names of those functions, no tests, that assert something themselves or by one another."""
    found, others = set(known), [function for function in functions if not _is_test(function)]
    while more := {f.name for f in others if f.name not in found and asserts(f, found)}:
        found |= more
    return found


def without_assertion(tree: ast.AST, elsewhere: set[str]) -> list[str]:
    """Test functions that assert nothing; `elsewhere`: helpers of other files, which count where they are imported."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    functions = _functions(tree)
    helpers = helpers_among(functions, elsewhere & {name.name for node in imports for name in node.names})
    return [f.name for f in functions if _is_test(f) and not asserts(f, helpers)]


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _is_test(function: ast.FunctionDef) -> bool:
    return function.name.startswith("test_")


def _called(node: ast.AST) -> str:
    """The name of what a call calls."""
    function = getattr(node, "func", None)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_every_test_asserts_something() -> None:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    shared = set().union(*(helpers_among(_functions(tree), set()) for tree in trees.values()))
    found = [f"{file.name}::{name}" for file, tree in trees.items() for name in without_assertion(tree, shared)]
    assert not found, f"without an assertion: {', '.join(found)}"
    assert Path(__file__) in trees


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("run()", ["test_it"]),
        ("assert run()", []),
        ("with pytest.raises(ValueError):\n        run()", []),
        ("check(run())", []),
        ("indirect(run())", []),
        ("foreign(run())", ["test_it"]),
        ("borrowed(run())", []),
    ],
)
def test_what_counts_as_an_assertion(body: str, found: list[str]) -> None:
    source = (
        "from helpers import borrowed\n"
        "def check(x):\n    assert x\n"
        "def indirect(x):\n    check(x)\n"
        f"def test_it():\n    {body}\n"
    )
    assert without_assertion(ast.parse(source), {"borrowed", "foreign"}) == found
