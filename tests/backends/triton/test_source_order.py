"""The order in which Triton hashes kernels: what a function calls comes first, whatever a process asks for first."""

import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

from tqdit.backends.triton import sources


class Function:
    """A function of Triton's that notes when it is hashed."""

    def __init__(self, fn: FunctionType, done: list[str]) -> None:
        self.fn, self.done = fn, done
        self.hash: str | None = None
        self.bad = False

    @property
    def cache_key(self) -> str:
        self.hash = "stand-in"
        if self.bad:
            raise RuntimeError("unsupported")
        if self.fn.__name__ not in self.done:
            self.done.append(self.fn.__name__)
        return self.fn.__name__


CODE = """
def inner(x): return x
def outer(x): return inner(x)
def through(x): return helpers.scaled(x)
def itself(x): return itself(outer(x))
"""


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Function], list[str]]:
    """Functions of a module that calls one of another module, and the names in the order of their hashing."""
    done: list[str] = []
    monkeypatch.setattr(sources, "JITCallable", Function)
    monkeypatch.setattr(sources, "NATIVE", True)
    helpers, known = ModuleType("helpers"), ModuleType(f"{sources.KERNELS}known")
    exec("def scaled(x): return deepest(x)\ndef deepest(x): return x", vars(helpers))
    exec(CODE, vars(known))
    known.helpers = helpers  # type: ignore[attr-defined]
    found = {}
    for module in (helpers, known):
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType):
                found[name] = Function(value, done)
                setattr(module, name, found[name])
    monkeypatch.setitem(sys.modules, known.__name__, known)
    return found, done


@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_function_calls_is_hashed_before_it(functions: Any, backwards: bool) -> None:
    found, done = functions
    order = list(found.values())
    sources.hash_in_order([*(reversed(order) if backwards else order), "no function"])
    assert set(done) == set(found)
    for name, called in (("outer", "inner"), ("scaled", "deepest"), ("through", "scaled"), ("itself", "outer")):
        assert done.index(called) < done.index(name)


def test_the_functions_of_imported_kernel_modules_are_hashed(functions: Any) -> None:
    found, done = functions
    sources.hash_all()
    assert set(done) == set(found), "those of helpers too, which are called"


def test_a_function_that_cannot_be_hashed_is_left_to_who_uses_it(functions: Any) -> None:
    found, done = functions
    found["inner"].bad = True
    sources.hash_all()
    assert set(done) == set(found) - {"inner"}
    assert found["inner"].hash is None
    assert found["outer"].hash


def test_nothing_is_hashed_where_kernels_are_interpreted(functions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, done = functions
    monkeypatch.setattr(sources, "NATIVE", False)
    sources.hash_all()
    assert done == []
