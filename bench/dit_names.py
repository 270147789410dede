"""Count where DiT's module names and config keys stand outside the architectures.

    python bench/dit_names.py [REVISION]

A name that only `architectures/` knows costs a new architecture nothing. Prints JSON: files and lines of src/tqdit that
name one, for a git revision, or for the working tree if none is given.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "src/tqdit"
# Where a revision knows its architectures; before there was a room for them, they were in `models`.
ARCHITECTURES = (f"{SOURCE}/architectures/", f"{SOURCE}/models/sites.py", f"{SOURCE}/models/shapes.py")
NAMES = (
    r"DiTTransformer2DModel", r"transformer_blocks", r"\bnorm[13]\.", r"\battn1\b", r"\bto_[qkv]\b",
    r"\bto_out\b", r"\bff\.net\b", r"\bproj_out_[12]\b", r"\bpos_embed\b", r"\bnum_embeds_ada_norm\b",
    r"\bnum_attention_heads\b", r"\battention_head_dim\b", r"\bpatch_size\b", r"\bsample_size\b", r"\bin_channels\b",
    r"\bnum_layers\b", r"\bnorm_eps\b", r"\bclass_labels\b", r"\bclass_embedder\b", r"\btimestep_embedder\b",
)  # fmt: skip
PATTERN = re.compile("|".join(NAMES))


def sources(revision: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of every Python file of the package, at a revision or in the working tree."""
    if revision is None:
        for path in sorted((ROOT / SOURCE).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()
        return
    for path in git("ls-tree", "-r", "--name-only", revision, "--", SOURCE).splitlines():
        if path.endswith(".py"):
            yield path, git("show", f"{revision}:{path}")


def git(*arguments: str) -> str:
    """The output of a git command in the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def count(revision: str | None) -> dict[str, object]:
    """Lines that name something of DiT, in all and by file, outside the architectures."""
    by_file = {}
    for path, text in sources(revision):
        named = sum(1 for line in text.splitlines() if PATTERN.search(line))
        if named and not path.startswith(ARCHITECTURES):
            by_file[path] = named
    return {
        "revision": revision or "working tree",
        "files": len(by_file),
        "lines": sum(by_file.values()),
        "by_file": dict(sorted(by_file.items(), key=lambda item: -item[1])),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", help="git revision; the working tree by default")
    print(json.dumps(count(parser.parse_args().revision), indent=1))
