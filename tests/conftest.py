"""Load the fixtures of `shared.py` in the processes that run tests.

They import torch and diffusers, which takes seconds. The process that only deals tests out to others does not wait.
"""

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    deals_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not deals_out:
        gc.disable()  # until all tests are collected: modules and tests are made to stay
        config.pluginmanager.import_plugin("shared")


def pytest_collection_finish() -> None:
    """Spare collections of garbage during the tests what is there before: going through it takes half a second."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
