"""Let Triton hash the sources of our kernels in an order that no thread changes.

Triton 3.6 puts constants of the functions that a kernel calls into the hash of the kernel, but only of functions that
were hashed before (`DependenciesFinder._update_hash` in triton/runtime/jit.py; 3.9 does not). Where threads compile,
chance gives that order, and the next process does not find the compiled kernel in Triton's cache.
"""

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable

from tqdit.backends.triton.layouts import NATIVE

KERNELS = f"{__package__}.kernels."


def hash_all() -> None:
    """Hash every function of the kernel modules that are imported; what has been hashed stays as it is.

    Where Triton interprets kernels nothing is compiled, and nothing hashed.
    """
    if not NATIVE:
        return
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(KERNELS)]
    hash_in_order(value for module in modules for value in list(vars(module).values()))


def hash_in_order(functions: Iterable[Any]) -> None:
    """Hash the Triton functions among `functions`, each after the ones that it calls."""
    seen: set[int] = set()

    def visit(function: Any) -> None:
        if not isinstance(function, JITCallable) or id(function) in seen:
            return
        seen.add(id(function))
        for called in _named(function):
            visit(called)
        try:
            function.cache_key  # noqa: B018  # Triton computes it once
        except Exception:
            function.hash = None  # Triton leaves a stand-in there; who uses the function gets the error

    for function in functions:
        visit(function)


def _named(function: Any) -> Iterator[Any]:
    """Yield what the names in a function stand for: globals, and attributes of modules among them."""
    names, known = function.fn.__code__.co_names, function.fn.__globals__
    values = [known[name] for name in names if name in known]
    yield from values
    for module in values:
        if isinstance(module, ModuleType):
            yield from (vars(module)[name] for name in names if name in vars(module))
