"""Registers tqdit with diffusers as soon as diffusers is there, without importing it: that takes seconds."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = "diffusers.quantizers.auto"  # has diffusers' tables of quantization methods
INTEGRATION = "tqdit.integrations.diffusers"


def register_with_diffusers() -> None:
    """Register now if diffusers is imported, else when it is. Calling it again changes nothing."""
    if hasattr(sys.modules.get(WATCHED), "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the watched module as Python would, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
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
    """Where the integration is what imports diffusers it is only begun: it registers itself at its end."""
    register = getattr(importlib.import_module(INTEGRATION), "register", None)
    if register is not None:
        register()
