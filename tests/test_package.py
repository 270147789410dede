"""The wheel and the source archive: what is in them, what they say, and that the wheel works where it is installed.

`make release-check` does the same in clean environments.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from tqdit.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and with the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source")
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"tqdit-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"tqdit-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "tqdit"
    expected = {
        f"tqdit/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if not name.startswith("tqdit-")} == expected
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_source_archive_has_what_its_tests_need(built: Path) -> None:
    with tarfile.open(built / f"tqdit-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    some = {
        "Makefile", "NOTICE", "constraints.txt", "mkdocs.yml", "docs/howto/checkpoint.md",
        "tests/ops/test_reference.py", "tests/golden/format-4/expected.json", "bench/results/h200.json",
        "examples/train_fashion_dit.py",
    }  # fmt: skip
    assert some <= names
    assert not [name for name in names if name.endswith(".pyc") or "__pycache__" in name]


def test_the_metadata_say_what_a_stranger_asks(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("tqdit", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "diffusers" in metadata["Keywords"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# tqdit")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert {"bench", "docs", "openvino", "report"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.slow
def test_the_package_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In a folder of its own, beside the other packages of this environment."""
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel)
    paths = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    here = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    where = run(sys.executable, "-c", "import tqdit; print(tqdit.__file__)", **here)
    assert Path(where.strip()) == target / "tqdit" / "__init__.py"
    assert run(target / "bin" / "tqdit", "--version", **here) == f"tqdit {VERSION}\n"
    run(target / "bin" / "tqdit", "sample", "fashion-dit", "-o", "grid.png", "-n", "1", "--steps", "2", "-q", **here)
    assert (tmp_path / "grid.png").is_file()
