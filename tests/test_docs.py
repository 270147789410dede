"""The pages' figures are those of the committed result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_in_docs_come_from_the_result_files() -> None:
    command = [sys.executable, ROOT / "bench" / "make_results.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_local_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        links = [part.split(")")[0] for part in text.split("](")[1:]]
        for link in links:
            assert link.startswith("http") or (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"
