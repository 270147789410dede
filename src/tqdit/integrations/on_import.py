"""Registers tqdit with diffusers as soon as diffusers is there, without importing it: that takes seconds."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = "diffusers.quantizers.auto"  # has diffusers' tables of quantization methods


def register_with_diffusers() -> None:
    """Register now if diffusers is imported, else when it is. Calling it again changes nothing."""
    if module := sys.modules.get(WATCHED):
        _register(module)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the watched module as Python would, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    integration = importlib.import_module("tqdit.integrations.diffusers")
    module.AUTO_QUANTIZER_MAPPING.setdefault(integration.METHOD, integration.TQDiTQuantizer)
    module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(integration.METHOD, integration.TQDiTConfig)
