"""Read what torchrun tells the processes that it starts, and leave what they say where torchrun looks for it.

A process that torchrun did not start, or started alone, is the only one. torch is imported where it is needed: the
command line asks this module before it knows whether there is work.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from tqdit.errors import InputError

THREADS = "TQDIT_THREADS"  # the variable that says how many threads of torch each of several processes has


def launched() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) that torchrun gave this process; (0, 1, 0) without torchrun.

    Raises `InputError` naming a variable of the environment that is missing, no number, or beyond what it counts.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    values = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise InputError(f"WORLD_SIZE asks for several processes, but {name} is '{text}'; start them with torchrun")
        values.append(int(text))
    rank, size, local_rank = values
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value >= size:
            raise InputError(f"{name} is {value}; with WORLD_SIZE {size} it must be below {size}")
    return rank, size, local_rank


def threads_of_each() -> int | None:
    """Return the threads of torch in each of several processes on this machine; None: as many as torch has.

    They are those that TQDIT_THREADS names, or this process's cores over the processes of the machine
    (LOCAL_WORLD_SIZE). torchrun sets OMP_NUM_THREADS to 1 where it is not set, so a 1 says nothing; any other number is
    the user's and stays. Raises `InputError` for a TQDIT_THREADS that is no number from 1 on.
    """
    from tqdit.system.environment import cores

    asked = os.environ.get(THREADS)
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise InputError(f"{THREADS} is the number of threads of each process, from 1 on, got '{asked}'")
        return int(asked)
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores() // max(1, int(here) if here.isdecimal() else launched()[1]))


def check_alone(command: str) -> None:
    """Raise `InputError` if torchrun started several processes of a command that is the work of one."""
    if (size := launched()[1]) > 1:
        raise InputError(f"'{command}' runs in one process, torchrun started {size}; run it without torchrun")


def speaker() -> str:
    """Return 'rank 1 of 2: ', to put before a message of one of several processes; "" for a process alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f"rank {os.environ.get('RANK', '?')} of {size}: "


def tells(message: str) -> bool:
    """Say whether this process is the first to have `message` for the user: ranks that fail alike speak once.

    torchrun's own store keeps the count; where there is none, or it does not answer, every process speaks.
    """
    if not speaker() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"tqdit/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def leave_reason(message: str) -> None:
    """Leave the last words of this process where torchrun looks for them; torchrun ends its own message with them.

    Without torchrun nothing is written.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason}), encoding="utf-8")
