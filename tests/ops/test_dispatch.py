"""Backends by name, and what each site's kernel is called."""

import pytest
import torch

from tqdit.errors import InputError
from tqdit.ops import dispatch
from tqdit.ops.dispatch import BACKENDS, explain, get_backend, kernel_name, register
from tqdit.ops.schema import Backend
from tqdit.spec import Grid, GridParams, Role, SiteSpec

VERBS = {
    "kernel", "prepare", "prepare_float_input", "quantize", "project", "attend", "linear", "float_input_linear"
}  # fmt: skip


def test_auto_is_an_integer_backend() -> None:
    assert get_backend("auto").INTEGER
    assert get_backend().NAME in BACKENDS


def test_simulated_says_that_it_is_not_integer() -> None:
    assert not get_backend("simulated").INTEGER


def test_every_backend_has_every_operation() -> None:
    for name in BACKENDS:
        backend = get_backend(name)
        assert name == backend.NAME
        operations = {n for n, m in vars(Backend).items() if callable(m) and n[0] != "_"}
        assert operations == VERBS
        for operation in operations:
            assert callable(getattr(backend, operation))


def test_a_backend_of_ones_own_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", dict(BACKENDS))
    register("mine", "tqdit.ops.simulated")
    assert get_backend("mine").NAME == "simulated"
    assert explain("cpu")["mine"] == explain("cpu")["simulated"]
    with pytest.raises(InputError, match=r"'other'; known: auto, .*, mine"):
        get_backend("other")


def test_a_backend_that_cannot_be_registered_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", dict(BACKENDS))
    with pytest.raises(InputError, match="cannot be named 'auto'"):
        register("auto", "tqdit.ops.simulated")
    register("mine", "no_such_package.backend")
    with pytest.raises(InputError, match=r"backend 'mine' cannot be loaded from 'no_such_package\.backend': No module"):
        get_backend("mine")


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'tpu'; known: auto, .*reference"):
        get_backend("tpu")


@pytest.mark.parametrize(
    ("role", "grid", "backend", "kernel"),
    [
        (Role.INPUT, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.WEIGHT, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.GELU, Grid.MRQ_GELU, "reference", "reference.linear[int8, 2 products]"),
        (Role.GELU, Grid.UNIFORM, "reference", "reference.linear[int8]"),
        (Role.KEY, Grid.UNIFORM, "reference", "reference.scores[int8]"),
        (Role.SOFTMAX, Grid.MRQ_SOFTMAX, "reference", "reference.values[int8, 2 products]"),
        (Role.WEIGHT_ONLY, Grid.UNIFORM, "reference", "reference.float_input_linear[float32 x int8]"),
        (Role.SOFTMAX, Grid.MRQ_SOFTMAX, "simulated", "simulated.values[float32]"),
    ],
)
def test_kernel_names(role: Role, grid: Grid, backend: str, kernel: str) -> None:
    scale = torch.tensor([[[0.001, 0.013]]]) if grid.two_region else torch.ones(1, 1)
    assert kernel_name(GridParams(SiteSpec("s", role, 8, grid), scale), get_backend(backend)) == kernel


def test_merged_regions_are_one_product() -> None:
    site = SiteSpec("s", Role.SOFTMAX, 6, Grid.MRQ_SOFTMAX)
    params = GridParams(site, torch.tensor([[[0.01, 0.04]]]))
    assert kernel_name(params, get_backend("reference")) == "reference.values[int8, 1 merged product]"


def test_automatic_choice_is_the_cpu_backend_on_a_cpu_and_never_simulated() -> None:
    assert get_backend("auto", "cpu").NAME == "cpu"
    assert ("triton" if torch.cuda.is_available() else "reference") == get_backend("auto", torch.device("cuda")).NAME


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'triton' cannot run on cuda: torch sees no NVIDIA GPU"):
        get_backend("triton", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="'triton-packed' cannot run on cpu: it runs on NVIDIA GPUs only"):
        get_backend("triton-packed", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="'triton' cannot run on cuda: Triton is not installed"):
        get_backend("triton", "cuda")


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"needs compute capability 8\.0, the GPU has 7\.5"):
        get_backend("triton", "cuda")


def test_a_backend_asked_for_that_cannot_run_says_why() -> None:
    with pytest.raises(InputError, match="'cpu' cannot run on cuda: it runs on CPUs only"):
        get_backend("cpu", "cuda")


def test_explain_names_every_backend() -> None:
    assert list(explain("cpu")) == list(BACKENDS)
    assert "linear[" in explain("cpu")["cpu"]
    assert explain("cuda")["cpu"] == "it runs on CPUs only"
