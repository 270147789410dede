"""Which backend runs which operation, and why not another."""

import importlib
from types import SimpleNamespace
from typing import cast

from tqdit.errors import InputError
from tqdit.ops.schema import Backend
from tqdit.spec import Grid, Role, SiteSpec

# Name -> module. The first one is what "auto" means.
BACKENDS = {"reference": "tqdit.ops.reference", "simulated": "tqdit.ops.simulated"}

_OPERATIONS = {
    Role.WEIGHT: "linear",
    Role.WEIGHT_ONLY: "weight_only_linear",
    Role.INPUT: "linear",
    Role.GELU: "linear",
    Role.QUERY: "scores",
    Role.KEY: "scores",
    Role.VALUE: "values",
    Role.SOFTMAX: "values",
}

_MEMBERS = ("NAME", "INTEGER", "quantize", "linear", "scores", "values", "weight_only_linear")


def get_backend(name: str = "auto") -> Backend:
    """The backend of that name; "auto" is the first of BACKENDS."""
    if name == "auto":
        name = next(iter(BACKENDS))
    if name not in BACKENDS:
        raise InputError(f"unknown backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    module = importlib.import_module(BACKENDS[name])
    # Its functions, not the module: a model that holds a module can be neither copied nor pickled.
    return cast(Backend, SimpleNamespace(**{member: getattr(module, member) for member in _MEMBERS}))


def kernel_name(site: SiteSpec, backend: Backend) -> str:
    """The kernel that will consume a site, such as "reference.linear[int8, 2 products]"."""
    operation = _OPERATIONS[site.role]
    if not backend.INTEGER:
        detail = "float32"
    elif site.role is Role.WEIGHT_ONLY:
        detail = "float32 x int8"
    else:
        detail = "int8, 2 products" if site.grid is not Grid.UNIFORM else "int8"
    return f"{backend.NAME}.{operation}[{detail}]"
