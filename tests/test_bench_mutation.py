"""`bench/mutation.py`: which mutants a module has, and what is said of one. No module of ours is mutated here."""

import importlib
import importlib.util
import sys
import textwrap
import types
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("mutation_script", BENCH / "mutation.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutation_script", module)
    spec.loader.exec_module(module)
    return module


def changes(script: types.ModuleType, source: str) -> list[tuple[str, str]]:
    return [(mutant.before, mutant.after) for mutant in script.mutants(textwrap.dedent(source))]


TOY = '''\
"""Text with 1 < 2."""

def clipped(x: "int", low: "dict[1]" = 0) -> "list[2]":
    """More text: x + 1."""
    if not x < low:
        raise ValueError(f"{x + 1} is above")
    return max(x, low)
'''


def test_the_mutants_of_a_toy_module(script) -> None:
    assert changes(script, TOY) == [
        ("0", "(1)"),
        ("0", "(-1)"),
        ("not x < low", "(x < low)"),
        ("x < low", "(x <= low)"),
        ("x < low", "(x >= low)"),
        ('raise ValueError(f"{x + 1} is above")', "pass"),
        ("return max(x, low)", "return x"),
        ("max(x, low)", "(min(x, low))"),
    ]


def test_a_mutant_is_the_source_with_one_change(script) -> None:
    source = "# é: two bytes\n" + TOY
    found = script.mutants(source)
    assert found[3].apply(source) == source.replace("x < low", "(x <= low)")
    assert found[3].line == 6
    for mutant in found:
        compile(mutant.apply(source), "toy", "exec")


def test_functions_can_be_left_out(script) -> None:
    assert script.mutants(TOY, ["clipped"]) == []
    assert script.mutants("def f():\n    return 1\n" + TOY, ["clipped"]) == script.mutants("def f():\n    return 1\n")


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("tables = candidates(base)[region]", "candidates(base)[region]", "(candidates(base)[0])"),
        ("done = same and not independent", "same and not independent", "(same)"),
        ("codes = torch.round(x / s) + z", "torch.round(x / s) + z", "(torch.round(x / s + z))"),
        ("bad = (z < low) | (z > high)", "(z < low) | (z > high)", "(z > high)"),
        ("bad = a.dtype != i32 or a.shape != shape", "a.dtype != i32 or a.shape != shape", "(a.dtype != i32)"),
        ("for key in sorted({*public, *kept}): pass", "{*public, *kept}", "({*kept})"),
        ("good = torch.isfinite(x).all()", "torch.isfinite(x)", "(~torch.isnan(x))"),
        ("key = (id(packed), bits, shape)", "(id(packed), bits, shape)", "((id(packed), shape))"),
        ("EXACT = 2**24 // MOST", "24", "(25)"),
        ("group = torch.floor(t).long()", "torch.floor(t)", "(t)"),
        ("exponents = range(1, 19 - bits)", "19", "(18)"),
        ("x = a if b else c", "b", "(not b)"),
        ("y = x[1:n]", "x[1:n]", "(x[1:])"),
        ("y = x.clamp(min=0)", "x.clamp(min=0)", "(x.clamp(max=0))"),
        ("y = torch.where(c, a, b)", "torch.where(c, a, b)", "(torch.where(c, b, a))"),
        ("y = x.amin(0, keepdim=True)", "x.amin(0, keepdim=True)", "(x.amax(0, keepdim=True))"),
        ("on = True", "True", "(False)"),
        ("f(x)", "f(x)", "pass"),
        ("total += part", "total += part", "total -= part"),
    ],
)
def test_kinds_of_faults_that_are_made(script, source: str, before: str, after: str) -> None:
    assert (before, after) in changes(script, source)


@pytest.mark.parametrize(
    "source",
    [
        "from a import b",
        "assert x is not None",
        "x: dict[str, int]",
        "@cache(maxsize=1)\ndef f(): ...",
        "Combine = Callable[[a, b], c]",
        "text = f'{4 * x}'",
        "z = zip(a, b, strict=True)",
        "pair = cat([x, x])",
    ],
)
def test_what_is_left_as_it_is(script, source: str) -> None:
    assert changes(script, source) == []


def spin(_: object) -> int:
    while True:
        pass


@pytest.mark.parametrize(
    ("tested", "outcome"), [(lambda _: 0, "survived"), (lambda _: 1, "killed"), (spin, "timed out")]
)
def test_outcomes(script, monkeypatch, tested, outcome: str) -> None:
    monkeypatch.setattr(script, "_tested", tested)
    task = script.Task("toy", "", cpu_seconds=1)
    assert list(script._run([task], jobs=1)) == [(None, outcome)]


def test_an_import_takes_the_mutant(script, monkeypatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [script.Mutated("toy/part", "LIMIT = 2"), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "tqdit.toy", types.ModuleType("tqdit.toy"))
    sys.modules["tqdit.toy"].__path__ = []
    try:
        assert importlib.import_module("tqdit.toy.part").LIMIT == 2
    finally:
        sys.modules.pop("tqdit.toy.part", None)


def test_equal_faults_of_other_lines_are_not_equivalent(script, monkeypatch) -> None:
    equivalent = sys.modules["equivalent_mutants"]
    monkeypatch.setattr(equivalent, "EQUIVALENT", (("toy", "low = 0", "constant", "(-1)", "why"),))
    source = "low = 0\nhigh = 0\n"
    found = [equivalent.reason("toy", source, mutant) for mutant in script.mutants(source)]
    assert found == [None, "why", None, None]
    monkeypatch.setattr(equivalent, "EQUIVALENT", (("toy", "low = 0\nhigh", "constant", "(-1)", "why"),))
    found = [equivalent.reason("toy", source, mutant) for mutant in script.mutants(source)]
    assert found == [None, "why", None, None]
    monkeypatch.setattr(equivalent, "EQUIVALENT", (("toy", "high = 0", "constant", "(-1)", "why"),))
    found = [equivalent.reason("toy", source, mutant) for mutant in script.mutants(source)]
    assert found == [None, None, None, "why"]
    assert equivalent.reason("other", source, script.mutants(source)[1]) is None


def test_modules_and_their_tests_exist(script) -> None:
    from equivalent_mutants import EQUIVALENT

    assert {entry[0] for entry in EQUIVALENT} <= set(script.TESTS)
    assert all((script.PACKAGE / f"{module}.py").is_file() for module in script.TESTS)
    paths = [*sum(script.TESTS.values(), ()), *(name.partition("::")[0] for name in script.DESELECTED)]
    assert all((script.ROOT / path).is_file() for path in paths)
