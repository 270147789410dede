"""Run the commands in a terminal of 80 columns, and keep the last screen of each as text.

python bench/screens.py --json bench/results/screens.json
"""

import argparse
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from tqdit.system.environment import environment

ROWS, COLUMNS = 50, 80
QUANTIZE = ["quantize", "fashion-dit", "-o", "w8a8", "--samples", "8", "--steps", "50", "--rounds", "1"]
COMMANDS: tuple[list[str], ...] = (
    QUANTIZE,
    ["inspect", "w8a8"],
    ["compare", "fashion-dit", "w8a8", "-n", "8", "--steps", "20"],
    ["bench", "w8a8", "--against", "float32,bfloat16", "--repeats", "5", "--no-sampling"],
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        screens = [screen(command, Path(folder)) for command in COMMANDS]
    for shown in screens:
        print(f"$ {shown['command']}", *shown["lines"], "", sep="\n")
    result = {"environment": environment(), "columns": COLUMNS, "screens": screens}
    args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def screen(command: list[str], folder: Path) -> dict[str, object]:
    """Run `tqdit` in a terminal; `lines` is what stands there when it has finished."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tqdit", *command], cwd=folder, env=environ, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    received = bytearray()
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the terminal of a process that has ended
            break
        if not part:
            break
        received += part
    os.close(master)
    lines = rendered(received.decode(errors="replace"))
    return {"command": " ".join(["tqdit", *command]), "exit_code": process.wait(), "lines": lines}


def rendered(text: str) -> list[str]:
    """The lines of a screen: of what a bar wrote over and over, the last. Knows cursor up and erase line alone."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\n|\r|\x1b\[[0-9;?]*[ -/]*[@-~])", text):
        if part in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part == "\r" or ESCAPES.fullmatch(part):
            if part.endswith("K"):
                lines[row] = ""
        elif part:
            lines[row] = part if lines[row] == "" else lines[row] + part
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    main()
