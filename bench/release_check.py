"""Build the wheel and the source archive, check both, and use each in a clean environment, as a stranger would.

python bench/release_check.py
python bench/release_check.py --keep dist    # also keep both files

It ends with exit code 1 at the first thing that is wrong, which it names. The environments have the versions of
constraints.txt, and are removed afterwards. It takes minutes, because PyTorch is installed twice.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

from trove_classifiers import classifiers

from pages import ROOT
from tqdit.version import VERSION

# What a stranger does first: every command has to end well. The calibration is as short as can be.
SHORT = ["--samples", "1", "--steps", "4", "--rounds", "0", "--set", "groups=2", "--set", "hessian=none"]
FIRST_COMMANDS = (
    ["--version"],
    ["sample", "fashion-dit", "-o", "float.png", "-n", "2", "--steps", "4"],
    ["quantize", "fashion-dit", "-o", "w8a8", *SHORT],
    ["sample", "w8a8", "-o", "grid.png", "-n", "2", "--steps", "4"],
    ["inspect", "w8a8"],
)


def main() -> None:
    """Run every check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the wheel and the source archive")
    keep = parser.parse_args().keep
    check_project()
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder))
        run(sys.executable, "-m", "twine", "check", "--strict", *made)
        check_metadata(made[0])
        for file in made:
            use(file, Path(folder) / file.name.replace(".", "-"))
            print(f"{file.name}: installed and used in a clean environment")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for file in made:
                shutil.copy2(file, keep)
    print(f"tqdit {VERSION} is ready")


def check_project() -> None:
    """End if the changes of this version are not told, or a requirement of the package has no pinned version."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(VERSION)}\b", changes, re.MULTILINE):
        sys.exit(f"CHANGELOG.md has no section '## {VERSION}'")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    free = [name for name in project["dependencies"] if canonical(name) not in pinned]
    if free:
        sys.exit(f"constraints.txt has no version of {', '.join(free)}")


def canonical(requirement: str) -> str:
    """Return the name of a requirement in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def build(folder: Path) -> list[Path]:
    """Return the wheel and the source archive; the wheel is built from the archive, so nothing is missing there."""
    source = folder / "source"  # a copy, because building leaves files where it works
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--outdir", folder, source)
    return [next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))]


def check_metadata(wheel: Path) -> None:
    """End if the wheel's metadata has a classifier that there is not, or lacks a licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    metadata = Parser().parsestr(text)
    unknown = set(metadata.get_all("Classifier", [])) - set(classifiers)
    if unknown:
        sys.exit(f"there are no such classifiers: {', '.join(sorted(unknown))}")
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    if licences != {"LICENSE", "NOTICE"}:
        sys.exit(f"the wheel has the licence files {sorted(licences)}")


def use(file: Path, folder: Path) -> None:
    """Install a file in a new environment, and run a stranger's first commands in an empty folder."""
    run(sys.executable, "-m", "venv", folder)
    binaries = folder / "bin"
    place = folder / "work"
    place.mkdir()
    pip = (binaries / "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "-c", ROOT / "constraints.txt", file, cwd=place)
    run(*pip, "check", cwd=place)
    for command in FIRST_COMMANDS:
        run(binaries / "tqdit", *command, cwd=place)
    shutil.rmtree(folder)


def run(*command: object, cwd: Path | None = None) -> None:
    """Run a command, and end if it fails. With `cwd` no variable leads Python to packages outside its environment."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    environ = {name: value for name, value in os.environ.items() if cwd is None or name != "PYTHONPATH"}
    if subprocess.run(words, cwd=cwd, env=environ, check=False).returncode:
        sys.exit(f"failed: {' '.join(words)}")


if __name__ == "__main__":
    main()
