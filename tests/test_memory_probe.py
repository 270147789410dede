"""Memory of one model in its own process: orders of magnitude that only the right measurement gives."""

import subprocess
import sys

import pytest
import torch

from tqdit.artifact import folder as artifact
from tqdit.recipe import Recipe
from tqdit.speed.memory_probe import footprint
from tqdit.speed.random_solution import random_solution
from tqdit.speed.random_weights import random_float

MB = 1_000_000


@pytest.fixture(scope="module")
def config(tiny_dit) -> dict:
    sizes = {"num_layers": 2, "num_attention_heads": 16, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8}
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(**sizes).config}


@pytest.fixture(scope="module")
def request_(config) -> dict:
    return {"config": config, "batch": 2, "device": "cpu", "threads": 1}


def test_a_float_model_takes_its_weights(config, request_) -> None:
    weights = sum(p.numel() * 4 for p in random_float(config).parameters())
    found = footprint({**request_, "baseline": "float32-eager"})
    assert weights * 0.9 < found.resident_bytes < weights + 30 * MB, "imports and the pool of random numbers are out"
    assert found.resident_bytes <= found.peak_bytes < found.resident_bytes + 60 * MB
    assert found.load_seconds is None


def test_an_artifact_takes_its_codes(config, request_, tmp_path) -> None:
    solution = random_solution(config, Recipe("plus"))
    artifact.write(solution, tmp_path)
    codes = sum({c.data_ptr(): c.numel() for c in solution.codes.values()}.values())
    found = footprint({**request_, "artifact": str(tmp_path), "backend": "cpu", "dtype": "float32"})
    assert codes > 35 * MB
    # A float copy, kept or only freed, would add four times the codes.
    assert codes * 0.5 < found.resident_bytes < 2.5 * codes, "less than the codes: imports left room to reuse"
    assert codes * 0.5 < found.peak_bytes < 2.5 * codes
    assert 0 < found.load_seconds < 60


def test_a_child_that_fails_gives_its_last_words(request_, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small child takes the place of the real one, which would import torch first."""
    run, child = subprocess.run, [sys.executable, "-c", "import sys; sys.exit('Traceback:\\nno more memory')"]
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(child, **options))
    with pytest.raises(RuntimeError, match=r"\Ano more memory\Z"):
        footprint({**request_, "baseline": "float32-eager"})


@pytest.mark.long
def test_a_model_that_does_not_load_is_the_last_word(request_, tmp_path) -> None:
    with pytest.raises(RuntimeError, match=f"unknown model '{tmp_path}/no'"):
        footprint({**request_, "artifact": f"{tmp_path}/no", "backend": "reference", "dtype": "float32"})


def test_threads_are_those_of_the_parent(request_, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process, with the model replaced: only the settings are looked at."""
    from tqdit.speed import memory_probe

    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(memory_probe, "_load", lambda request, device: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        memory_probe.measure({**request_, "threads": 3, "baseline": "float32-eager"})
    assert seen == [3]


def test_memory_that_graphs_keep_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this device, and what no tensor is in: the allocator counts the rest."""
    from tqdit.speed import memory_probe

    def segment(pool: tuple[int, int], total: int, allocated: int, device: int = 1) -> dict:
        return {"segment_pool_id": pool, "total_size": total, "allocated_size": allocated, "device": device}

    segments = [segment((0, 0), 1000, 10), segment((0, 1), 200, 50), segment((0, 2), 30, 0), segment((0, 1), 7, 0, 0)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    assert memory_probe._peak(torch.device("cuda:1")) == 5000 + 150 + 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("baseline", ["float32-eager", "float32-compiled"])
def test_memory_of_a_gpu(config, request_, baseline: str) -> None:
    weights = sum(p.numel() * 4 for p in random_float(config).parameters())
    found = footprint({**request_, "device": "cuda", "baseline": baseline})
    assert weights <= found.resident_bytes < weights + 5 * MB
    assert found.resident_bytes < found.peak_bytes < found.resident_bytes + 200 * MB
