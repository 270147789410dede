"""Very many damages, each read in a process that may die or hang without taking the others along.

`run` is for programs, and `python tests/trust/campaign.py COUNT SEED PROCESSES READER` prints its result.
"""

import json
import queue
import resource
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import artifacts  # noqa: E402
import readers  # noqa: E402
from corruption import all_damages  # noqa: E402

SECONDS = 20.0  # that one damage may take
START_SECONDS = 180.0  # until a process has imported everything, on a busy machine
MEMORY = 8 * 2**30  # of address space; a process has 3 GiB of libraries and thread stacks
BATCH = 100
BEFORE_US = (
    "num_layers",
    "pipe",
    "link to zeros",
)  # diffusers builds as many blocks, and opens files, before it calls tqdit


def run(count: int = 1500, seed: int = 0, processes: int = 2, reader: str = "tqdit") -> dict[str, Any]:
    """Read about `count` damaged artifacts. Returns, as JSON values, how many runs had which outcome, by family too,
    and the first failures in words. Outcomes other than `readers.GOOD` are failures.

    `reader`: of `readers.READERS`. Damages to files that it never opens are not run.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        artifacts.make_all(root)
        damages = all_damages(root, count, seed)
        starts = range(0, len(damages), BATCH)
        with ThreadPoolExecutor(processes) as pool:
            batches = pool.map(partial(_batch, root, count, seed, reader, len(damages)), starts)
            found = [
                (index, "hang in diffusers", text)
                if result == "hang" and _is_upstream(damages[index], reader)
                else (index, result, text)
                for batch in batches
                for index, result, text in batch
                if result != readers.NOT_READ
            ]
    totals: Counter[str] = Counter(result for _, result, _ in found)
    families: dict[str, Counter[str]] = {}
    for index, result, _ in found:
        families.setdefault(damages[index].family, Counter())[result] += 1
    failures = [f"{result}: {damages[index]}: {text}" for index, result, text in found if result not in readers.GOOD]
    return {
        "runs": len(found),
        "outcomes": dict(sorted(totals.items())),
        "by_family": {name: dict(sorted(counts.items())) for name, counts in sorted(families.items())},
        "failures": len(failures),
        "first_failures": failures[:40],
    }


def _is_upstream(damage: object, reader: str) -> bool:
    """Whether diffusers would hang over a damage by itself."""
    return reader == "diffusers" and any(word in str(damage) for word in BEFORE_US)


def _batch(root: Path, count: int, seed: int, reader: str, total: int, start: int) -> list[tuple[int, str, str]]:
    """(number, outcome, sentence) of some damages, whatever becomes of the processes that read them."""
    end = min(start + BATCH, total)
    found: list[tuple[int, str, str]] = []
    while start < end:
        for index, result, text in _one_process([root, count, seed, start, end, reader]):
            found.append((index, result, text))
            start = index + 1
            if result not in (*readers.GOOD, readers.NOT_READ):
                print(f"damage {index}: {result}: {text}", file=sys.stderr, flush=True)
        print(f"{start} of {total} damages read", file=sys.stderr, flush=True)
    return found


def _one_process(job: list[Any]) -> Iterator[tuple[int, str, str]]:
    """Results of `read` as they come; if the process dies or hangs, the last one says so."""
    *_, start, end, _ = job
    command = [sys.executable, str(HERE / "campaign.py"), "read", *map(str, job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
        limit, following = START_SECONDS, start
        while following < end:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                child.kill()
                yield following, "hang", f"no result in {limit:.0f} s"
                return
            if line is None:
                yield following, "died", f"exit code {child.wait()}"
                return
            limit = SECONDS
            if line.startswith("["):
                index, result, text = json.loads(line)
                yield index, result, text
                following = index + 1


def _forward(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def read(root: Path, count: int, seed: int, start: int, end: int, reader: str = "tqdit") -> None:
    """Print the outcome of each damage, one JSON array a line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    expected = {kind: readers.READERS[reader](root / kind) for kind in artifacts.KINDS}
    print("ready", flush=True)
    for index, damage in list(enumerate(all_damages(root, count, seed)))[start:end]:
        print(json.dumps([index, *readers.outcome(damage, root, expected, reader)]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        read(Path(sys.argv[2]), *map(int, sys.argv[3:7]), *sys.argv[7:])
    else:
        print(json.dumps(run(*map(int, sys.argv[1:4]), *sys.argv[4:]), indent=1))
