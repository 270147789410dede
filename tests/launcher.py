"""Starting several processes as users do."""

import os
import subprocess
import sys
from pathlib import Path

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "OMP_NUM_THREADS": "1"}


def torchrun(*command: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Processes of a script, or of `-m MODULE`; for machines without a network."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run(
        [*launcher, "--local-addr", "127.0.0.1", *map(str, command)],
        env={**os.environ, **LOOPBACK, "CUDA_VISIBLE_DEVICES": ""},  # on the CPU, where no device is named
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
