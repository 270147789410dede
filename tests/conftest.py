"""Load the fixtures of `shared.py` in the processes that run tests.

They import torch and diffusers, which takes seconds. The process that only deals tests out to others does not wait.
"""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    deals_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not deals_out:
        config.pluginmanager.import_plugin("shared")
