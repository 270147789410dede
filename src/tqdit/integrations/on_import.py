"""Register tqdit with diffusers as soon as diffusers is imported.

tqdit does not import diffusers for this, since that takes seconds.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = "diffusers.quantizers.auto"  # the module of diffusers' tables of quantization methods
INTEGRATION = "tqdit.integrations.diffusers"


def register_with_diffusers() -> None:
    """Register now if diffusers is imported, else when it is. Calling this again changes nothing."""
    if hasattr(sys.modules.get(WATCHED), "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """A finder that finds the watched module as Python would, and registers tqdit after the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the watched module's spec with a loader that registers tqdit; None for any other module."""
        if fullname != WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Call the integration's `register`.

    The integration may itself be importing diffusers. Then it has no `register` yet, and registers itself at its end.
    """
    register = getattr(importlib.import_module(INTEGRATION), "register", None)
    if register is not None:
        register()
