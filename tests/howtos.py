"""The code of the how-to pages, as it stands in them.

A fenced Python block that begins with `# name.py` is that module; the other blocks run in order in one namespace.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(?:# (\w+)\.py\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str | None, CodeType]]:
    """The name of the module, if a block is one, and the code of every block of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(2))
        yield found[1], compile("\n" * line + found[2], str(DOCS / page), "exec")


def module(name: str, code: CodeType) -> ModuleType:
    """Make a module that can be imported by its name, without a file."""
    made = ModuleType(name)
    sys.modules[name] = made
    exec(code, vars(made))
    return made
