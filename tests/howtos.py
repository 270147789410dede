"""The code of the pages, as it stands in them: Python blocks, and shell commands.

A fenced Python block that begins with `# name.py` is that module; the other blocks of a page run in order in one
namespace. A block that cannot run has the comment `<!-- not run: REASON -->` in the line above it.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n\Z")
NAMED = re.compile(r"# (\w+)\.py\n")
SHELLS = ("bash", "console", "sh")
COMMANDS = ("tqdit", "torchrun", "make", "python", "pip")  # an indented line of one of these is a shell command


@dataclass(frozen=True)
class Block:
    """One block of a page: its language ("" for an indented one), its text, and the line where the text begins.

    `reason`: why the block is not run, or None.
    """

    page: Path
    language: str
    text: str
    line: int
    reason: str | None

    @property
    def where(self) -> str:
        """Return the place for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def name(self) -> str | None:
        """Return the name of the module that a Python block is."""
        found = NAMED.match(self.text) if self.language == "python" else None
        return found and found[1]

    def code(self) -> CodeType:
        """Compile a Python block; errors name the line of the page."""
        return compile("\n" * (self.line - 1) + self.text, str(self.page), "exec")

    def commands(self) -> list[list[str]]:
        """Return the words of each shell command of a block, without comments; none of another language."""
        if self.language not in (*SHELLS, ""):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines if _is_shell(self, line)]
        return [command for command in words if command]


def _is_shell(block: Block, line: str) -> bool:
    return bool(block.language) or (line.split() or [""])[0] in COMMANDS


def pages() -> list[Path]:
    """Return README.md and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def all_blocks(page: Path) -> Iterator[Block]:
    """Yield every fenced or indented block of a page in order."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        start = found.start(2) if found[3] is None else found.start(3)
        reason = NOT_RUN.search(text, 0, found.start())
        content = found[2] if found[3] is None else found[3]
        yield Block(page, found[1] or "", content, text.count("\n", 0, start) + 1, reason and reason[1])


def python_blocks(page: Path) -> list[Block]:
    """Return the Python blocks of a page, those that are not run, too."""
    return [block for block in all_blocks(page) if block.language == "python"]


def blocks(page: str) -> Iterator[tuple[str | None, CodeType]]:
    """The name of the module, if a block is one, and the code of every Python block of a page of docs/."""
    for block in python_blocks(DOCS / page):
        yield block.name, block.code()


def of_tqdit(command: Sequence[str]) -> list[str] | None:
    """Return the arguments of a command of tqdit, also under torchrun and after variables; None for another."""
    words = list(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["torchrun"] and "tqdit" in words:
        return words[words.index("tqdit") + 1 :]
    return words[1:] if words[:1] == ["tqdit"] else None


def module(name: str, code: CodeType) -> ModuleType:
    """Make a module that can be imported by its name, without a file."""
    made = ModuleType(name)
    sys.modules[name] = made
    exec(code, vars(made))
    return made
