"""Every public thing in `src/tqdit` has a docstring, whose first line is a sentence.

`ROOMS` has the rooms whose docstrings keep the rule. The others (architectures, sampling, sources and the modules at
the top) are not in it yet: add a room when its docstrings have been rewritten.
`NOT_YET` has the files of these rooms that do not keep the rule yet.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tqdit"
ROOMS = (
    "artifact", "backends", "calibration", "cli", "evaluation", "grids", "imaging", "integrations", "layers", "ops",
    "quality", "report", "runtime", "search", "serving", "speed", "system",
)  # fmt: skip
NOT_YET = ("calibration/states.py", "calibration/trajectories.py", "quality/comparison.py")
FRAGMENT = re.compile(
    r"(Of|What|Whether|Where|How|Why|Which|Who|Whoever|As|The same|Those|That|None|Nothing|It|Its|They|So|But|Else|"
    r"Never|By|With|Without|From|Half|Because|Said)\b(?!-)|\(|Everything\b|All of\b"
)
ENDS = (".", ":", "?")
OUTSIDE = {"forward", "get_extra_state", "set_extra_state", "add_module"}  # `torch.nn.Module` documents these
Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, path: str = "") -> Iterator[tuple[str, Node, bool]]:
    """Yield (name, definition, whether it is inside a function) of everything that is defined in `node`."""
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{path}.{child.name}" if path else child.name
            yield name, child, inside
            yield from ((n, d, inside or local) for n, d, local in definitions(child, name))
        else:
            yield from ((n, d, inside or local) for n, d, local in definitions(child, path))


def classes(trees: list[ast.Module]) -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def bases(node: ast.ClassDef, known: dict[str, list[ast.ClassDef]]) -> Iterator[ast.ClassDef]:
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        for found in known.get(name, ()):
            if found is not node:
                yield found
                yield from bases(found, known)


def documented(node: ast.ClassDef) -> set[str]:
    functions = (item for item in node.body if isinstance(item, ast.FunctionDef))
    return {item.name for item in functions if ast.get_docstring(item)}


def of_protocols(known: dict[str, list[ast.ClassDef]]) -> set[str]:
    """Return the methods that some protocol documents: a class that implements it need not say the same."""
    everything = (node for nodes in known.values() for node in nodes)
    protocols = [node for node in everything if any("Protocol" in ast.unparse(base) for base in node.bases)]
    return set().union(*map(documented, protocols))


def is_overload(node: Node) -> bool:
    """Say whether a definition is one of several signatures, of which the last one has the docstring."""
    return any(ast.unparse(decorator) == "overload" for decorator in getattr(node, "decorator_list", ()))


def undocumented(tree: ast.Module, known: dict[str, list[ast.ClassDef]]) -> Iterator[str]:
    """Yield what is public, not local to a function, and neither has a docstring nor inherits one."""
    elsewhere = OUTSIDE | of_protocols(known)
    classes_here = {name: node for name, node, _ in definitions(tree) if isinstance(node, ast.ClassDef)}
    for name, node, local in [("module", tree, False), *definitions(tree)]:
        parent, _, leaf = name.rpartition(".")
        private = any(part.startswith("_") for part in name.split("."))
        if local or private or is_overload(node) or ast.get_docstring(node):
            continue
        above = map(documented, bases(classes_here[parent], known)) if parent else ()
        if not (parent and leaf in elsewhere.union(*above)):
            yield name


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def of_source() -> dict[str, list[ast.ClassDef]]:
    """Return the classes of all of `SOURCE`, which takes a second to find."""
    return classes([parsed(path) for path in SOURCE.rglob("*.py")])


def problems(paths: list[Path]) -> list[str]:
    """List what does not keep the rule in some files of `SOURCE`."""
    known, found = of_source(), []
    for path in paths:
        tree, where = parsed(path), path.relative_to(SOURCE)
        found += [f"{where}: {name} has no docstring" for name in undocumented(tree, known)]
        for name, node, _ in [("module", tree, False), *definitions(tree)]:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if first and (FRAGMENT.match(first) or not first.endswith(ENDS)):
                found.append(f"{where}: {name}: {first}")
    return found


def files(room: str) -> list[Path]:
    return [path for path in sorted((SOURCE / room).rglob("*.py")) if str(path.relative_to(SOURCE)) not in NOT_YET]


def test_a_fragment_and_a_missing_docstring_are_found() -> None:
    tree = ast.parse('"""Say."""\n@overload\ndef f(): ...\ndef f():\n    """Say."""\n')
    assert list(undocumented(tree, {})) == []
    tree = ast.parse('"""Say."""\nclass A:\n    """A."""\n    def of(self): ...\n    def _own(self): ...\n')
    assert list(undocumented(tree, classes([tree]))) == ["A.of"]
    child = ast.parse('"""Say."""\nclass B(A):\n    """B."""\n    def of(self): ...\n')
    tree.body[1].body[1].body[0] = ast.parse('"""Return nothing."""').body[0]
    assert list(undocumented(child, classes([tree, child]))) == []
    assert FRAGMENT.match("Of a block: its rows.")
    assert not FRAGMENT.match("Whatever")
    assert not FRAGMENT.match("As-is copies")


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_are_sentences(room) -> None:
    assert files(room)
    assert problems(files(room)) == []
