"""Silence other libraries while they are imported or compile: their warnings and the tables of what they tried."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# torch.compile's options that print on standard error what each kernel's candidates took.
WITHOUT_TABLES = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log records up to errors, and torch's tables of kernels that it timed.

    An error that matters is raised, and whoever catches it outside says so. A failed candidate of a kernel is logged
    as an error by the compiler, which goes on with the others.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if known := _without_tables():
                stack.enter_context(known)
            yield
    finally:
        logging.disable(before)


def _without_tables() -> Any:
    """Return a context in which the compiler prints no tables; None before torch is imported."""
    if "torch" not in sys.modules:
        return None
    from torch._inductor import config

    known = {name: value for name, value in WITHOUT_TABLES.items() if hasattr(config, name)}
    return config.patch(known)
