"""tqdit without its optional packages: everything works but the report, which says what to install."""

import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import diffusers
import pytest
from packaging.requirements import Requirement

from tqdit.errors import InputError
from tqdit.speed import baselines
from tqdit.system import extras

SOURCE = str(Path(extras.__file__).parents[2])
ABSENT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {"matplotlib", "jinja2", "markupsafe", "scipy"}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_everything_else_imports_and_the_demo_says_what_is_missing(tmp_path: Path) -> None:
    """One process, since each imports torch."""
    code = ABSENT + (
        "import tqdit, tqdit.cli.main, tqdit.cli.demo, tqdit.speed.benchmark\n"
        "for name in tqdit.__all__: getattr(tqdit, name)\n"
        "print('imported')\n"
        "sys.argv = ['tqdit', 'demo', '-o', sys.argv[1]]\n"
        "tqdit.cli.main.main()\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "demo"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": SOURCE}
    )
    assert (done.returncode, done.stdout) == (2, "imported\n"), done.stderr
    assert done.stderr.startswith("tqdit: the report needs packages that are not installed: pip install ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_packages_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdit itself may not be on an index, so its extras' names are no help."""
    found = ["torch>=2.11", 'jinja2>=3.1; extra == "report"', "matplotlib>=3.10 ; extra == 'report'", 'x; extra == "b"']
    monkeypatch.setattr(extras, "requires", lambda name: found)
    assert extras.install_command("report") == "pip install 'jinja2>=3.1' 'matplotlib>=3.10'"
    assert extras.install_command("other") == "pip install '.[other]' in a clone of tqdit"


def test_torchao_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "requires", lambda name: ['torchao>=0.18; extra == "bench"'])
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    found = baselines.missing("torchao-int8", baselines.torch.device("cpu"))
    assert found == "torchao is not installed: pip install 'torchao>=0.18'"


def test_a_report_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the report needs packages"):
        extras.check_report()


def test_diffusers_is_in_the_range_that_is_promised() -> None:
    (promised,) = [Requirement(text) for text in requires("tqdit") or [] if Requirement(text).name == "diffusers"]
    assert promised.specifier.contains(diffusers.__version__)
