"""Choose the backend that runs a model, and explain why another one cannot."""

import importlib
from typing import Any, cast

import torch

from tqdit.errors import InputError
from tqdit.ops.schema import Backend
from tqdit.spec import GridParams, Role

# Name -> module with `BACKEND`, a class, and, where it cannot run everywhere, `unavailable(device) -> reason or None`.
BACKENDS = {
    "cpu": "tqdit.backends.cpu",
    "reference": "tqdit.ops.reference",
    "simulated": "tqdit.ops.simulated",
    "triton": "tqdit.backends.triton",
    "triton-packed": "tqdit.backends.triton.packed",
}
AUTOMATIC = ("cpu", "triton", "reference")  # the backends that "auto" tries, best first

_OPERATIONS = {
    Role.WEIGHT: "linear",
    Role.WEIGHT_ONLY: "float_input_linear",
    Role.INPUT: "linear",
    Role.GELU: "linear",
    Role.QUERY: "scores",
    Role.KEY: "scores",
    Role.VALUE: "values",
    Role.SOFTMAX: "values",
}


def register(name: str, module: str) -> None:
    """Add a backend of your own by name, or replace one.

    `module` is imported when the backend is asked for first. It has `BACKEND`, a class with the verbs of
    `schema.Backend`, and, where it cannot run everywhere, `unavailable(device)`, which returns the reason or None:

        register("mine", "my_package.my_backend")

    Raises `InputError` for the name "auto".
    """
    if name == "auto":
        raise InputError("a backend cannot be named 'auto', which means the best one for a device")
    BACKENDS[name] = module


def get_backend(name: str = "auto", device: str | torch.device = "cpu") -> Backend:
    """Return the backend of that name for a device; "auto" is the best one that can run there.

    Raises `InputError` for an unknown name, for a backend asked for by name that cannot run, saying why, and for one
    whose module is not there.
    """
    if name == "auto":
        name = next(candidate for candidate in AUTOMATIC if _unavailable(candidate, device) is None)
    if not isinstance(name, str) or name not in BACKENDS:
        raise InputError(f"unknown backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    if reason := _unavailable(name, device):
        raise InputError(f"backend '{name}' cannot run on {device}: {reason}")
    return cast(Backend, _module(name).BACKEND())


def explain(device: str | torch.device = "cpu") -> dict[str, str]:
    """Describe what every backend would do on a device.

    Return, by the backend's name, the kernel of each operation, or why the backend cannot run.
    """
    found = {}
    for name in BACKENDS:
        if reason := _unavailable(name, device):
            found[name] = reason
        else:
            backend = get_backend(name, device)
            operations = dict.fromkeys(_OPERATIONS.values())
            found[name] = ", ".join(f"{operation}[{backend.kernel(operation)}]" for operation in operations)
    return found


def kernel_name(params: GridParams, backend: Backend) -> str:
    """Return the name of the kernel that reads a site, such as "reference.linear[int8, 2 products]"."""
    spec = params.spec
    operation = _OPERATIONS[spec.role]
    detail = backend.kernel(operation)
    if backend.INTEGER and spec.grid.two_region:
        detail += ", 1 merged product" if params.merged else ", 2 products"
    return f"{backend.NAME}.{operation}[{detail}]"


def _unavailable(name: str, device: str | torch.device) -> str | None:
    check = getattr(_module(name), "unavailable", None)
    return check(torch.device(device)) if check else None


def _module(name: str) -> Any:
    """Import the module of a backend. Raise `InputError` if there is none of that name."""
    try:
        return importlib.import_module(BACKENDS[name])
    except ModuleNotFoundError as error:
        raise InputError(f"backend '{name}' cannot be loaded from '{BACKENDS[name]}': {error}") from None
