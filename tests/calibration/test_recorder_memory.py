"""What `record` keeps and what its process grows by: the records, not the batches that they were picked from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tqdit.architectures.registry import graph
from tqdit.architectures.shapes import shape_config
from tqdit.calibration.picker import Picker
from tqdit.calibration.recorder import batch_size, graph_bytes, picked_bytes, record
from tqdit.calibration.store import Forgetful
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import ClassLabels
from tqdit.speed.random_weights import random_float

STATUS = Path("/proc/self/status")
CONFIG = {**shape_config("DiT-S/2"), "num_layers": 4, "num_attention_heads": 3}
RECIPE = Recipe("paper", groups=1, samples=80, rows=512, queries=512)
TOKENS = 256


def test_a_batch_leaves_one_piece_of_memory(model, data, tiny_recipe) -> None:
    pieces = []

    class Watched(Forgetful):
        def once(self, name, make):
            pieces.append(super().once(name, make))
            return pieces[-1]

    record(model, data, tiny_recipe(), store=Watched())
    assert len(pieces) > 1
    for piece in pieces:
        tensors = piece.read().values()
        (storage,) = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values()
        assert storage.nbytes() == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=0.2)


@pytest.mark.long
@pytest.mark.skipif(not STATUS.is_file(), reason="the peak of a process is in /proc on Linux")
def test_a_process_grows_by_what_it_keeps() -> None:
    """In a process of its own, whose heap is as calibration leaves it. After the first batch, only records are new."""
    child = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    peaks = json.loads(child.stdout.splitlines()[-1])
    picker = Picker(RECIPE, RECIPE.samples, 2, TOKENS)
    size = batch_size(graph(CONFIG), picker, torch.device("cpu"))
    assert len(peaks) == RECIPE.samples // size
    room = size * graph_bytes(graph(CONFIG), picker)  # the heap may be as untidy as one more batch
    assert peaks[-1] - peaks[0] < RECIPE.samples * picked_bytes(graph(CONFIG), picker) + room


def calibration_set() -> CalibrationSet:
    count = RECIPE.samples
    x, zeros = torch.randn(count, 4, 32, 32), torch.zeros(count, dtype=torch.long)
    return CalibrationSet(x, torch.arange(count), zeros, zeros, torch.ones(count), ClassLabels(1000))


def peaks() -> list[int]:
    """The process's largest size in bytes, after every batch."""
    found: list[int] = []

    def look(_: float) -> None:
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        found.append(int(line.split()[1]) * 1024)

    record(random_float(CONFIG).requires_grad_(False), calibration_set(), RECIPE, look)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peaks()))
