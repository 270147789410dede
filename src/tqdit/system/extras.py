"""Name the packages of an optional part of tqdit, in words that work wherever tqdit was installed from."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, requires

from tqdit.errors import InputError


def check_report() -> None:
    """Raise `InputError` if the packages that draw the report are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("jinja2", "matplotlib")):
        raise InputError(f"the report needs packages that are not installed: {install_command('report')}")


def check_serve() -> None:
    """Raise `InputError` if the package that serves the page is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"the page needs a package that is not installed: {install_command('serve')}")


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra by their own names, as tqdit's metadata has them."""
    try:
        found = requires("tqdit") or []
    except PackageNotFoundError:
        found = []
    marked = re.compile(rf"""(?P<package>[^;]+);\s*extra\s*==\s*['"]{extra}['"]\s*""")
    packages = [match["package"].strip() for text in found if (match := marked.fullmatch(text))]
    if not packages:
        return f"pip install '.[{extra}]' in a clone of tqdit"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
