"""Whatever the caller has set in torch: the same bytes, normal tensors, and the caller's own state at the end."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tqdit
from tqdit.system import isolation
from tqdit.system.isolation import isolated, without_autocast
from tqdit.workflow import prepare, solve_prepared

SMALLEST = {
    "groups": 2, "samples": 2, "steps": 4, "sampler": "ddim", "rows": 32, "queries": 32, "candidates": 3, "rounds": 1,
}  # fmt: skip
World = Callable[[], AbstractContextManager[Any]]


@contextmanager
def set_to(put: Callable[[Any], None], value: Any, back: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(back)


def default_dtype(dtype: torch.dtype) -> World:
    return lambda: set_to(torch.set_default_dtype, dtype, torch.float32)


def autocast(kind: str, dtype: torch.dtype) -> World:
    return lambda: torch.autocast(kind, dtype=dtype)


@contextmanager
def precision(value: str) -> Iterator[None]:
    before = isolation._precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        isolation._set_precision(before)


@contextmanager
def no_grad_set() -> Iterator[None]:
    with torch.enable_grad():
        torch.set_grad_enabled(False)
        yield


def seeded_otherwise() -> AbstractContextManager[None]:
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    return nullcontext()


@contextmanager
def everything() -> Iterator[None]:
    with ExitStack() as stack:
        for name, world in WORLDS.items():
            if name != "everything at once":
                stack.enter_context(world())
        yield


WORLDS: dict[str, World] = {
    "bfloat16": default_dtype(torch.bfloat16),
    "float16": default_dtype(torch.float16),
    "float64": default_dtype(torch.float64),
    "autocast to bfloat16": autocast("cpu", torch.bfloat16),
    "autocast to float16": autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": no_grad_set,
    "default device": lambda: set_to(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "deterministic": lambda: set_to(torch.use_deterministic_algorithms, True, False),
    "precision high": lambda: precision("high"),
    "precision medium": lambda: precision("medium"),
    "attention by plain operations": lambda: sdpa_kernel(SDPBackend.MATH),
    "denormals are 0": lambda: set_to(torch.set_flush_denormal, True, False),
    "other seeds": seeded_otherwise,
    "everything at once": everything,
}
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=[name.replace(" ", "-") for name in WORLDS])
# Where an artifact is made when tests must be short; the last of these is all the others together.
FEW = ("bfloat16", "autocast to bfloat16", "inference mode", "default device", "everything at once")
each_or_few_worlds = pytest.mark.parametrize(
    "world",
    [
        pytest.param(world, id=name.replace(" ", "-"), marks=() if name in FEW else pytest.mark.long)
        for name, world in WORLDS.items()
    ],
)


def random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]


def state() -> list[Any]:
    """What `isolated` touches."""
    return [
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cuda"), isolation._precision(),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
        isolation._flushes_denormals(), torch.get_num_threads(), random_state(),
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> tqdit.Recipe:
    return tiny_recipe("plus", **SMALLEST)


@pytest.fixture(scope="module")
def plain(pipeline: Path, recipe: tqdit.Recipe, tmp_path_factory) -> Path:
    """The artifact that a caller gets who has set nothing."""
    out = tmp_path_factory.mktemp("plain") / "artifact"
    tqdit.quantize(pipeline, out, recipe)
    return out


@pytest.fixture(scope="module")
def images(plain: Path) -> torch.Tensor:
    return drawn(plain)


def drawn(folder: Path) -> torch.Tensor:
    return tqdit.sample(folder, ["0", "3"], 2, tqdit.Sampling("ddim", 2))


@each_or_few_worlds
def test_an_artifact_is_the_same_bytes_in_every_world(
    world: World, pipeline: Path, plain: Path, recipe: tqdit.Recipe, tmp_path: Path
) -> None:
    with world():
        before = state()
        tqdit.quantize(pipeline, tmp_path / "artifact", recipe)
        assert state() == before
    assert contents(tmp_path / "artifact") == contents(plain)


@worlds
def test_models_and_images_are_the_same_in_every_world(world: World, plain: Path, images: torch.Tensor) -> None:
    with world():
        before = state()
        model, found, sites = tqdit.load(plain), drawn(plain), tqdit.inspect(plain)
        assert state() == before
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in [found, *tensors])
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    floats = {name: x.dtype for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_floating_point()}
    assert {name for name, dtype in floats.items() if dtype is not torch.float32} == {"runtime.groups.edges"}
    assert torch.equal(found, images)
    assert sites == tqdit.inspect(plain)
    model.load_state_dict(model.state_dict())  # writes to every tensor


@worlds
def test_inside_is_as_in_a_fresh_process(world: World) -> None:
    with world(), isolated():
        assert torch.zeros(1).dtype is torch.float32
        assert torch.zeros(1).device.type == "cpu"
        x = torch.ones(2, 2, requires_grad=True)
        assert not x.is_inference()
        product = x @ x
        assert product.dtype is torch.float32
        assert product.requires_grad
        assert not torch.are_deterministic_algorithms_enabled()
        assert isolation._precision()[0] == "highest"
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not isolation._flushes_denormals()
        assert torch.tensor([1e-40]).mul(1.0).gt(0).all()


@isolated()
def fail() -> None:
    _ = 1 // 0


@worlds
def test_errors_restore_the_callers_world(world: World, tmp_path: Path) -> None:
    with world():
        before = state()
        with pytest.raises(tqdit.InputError):
            tqdit.load(tmp_path / "nothing")
        with pytest.raises(ZeroDivisionError):
            fail()
        assert state() == before


def test_draws_of_the_caller_inside_go_on() -> None:
    """As those of another thread do: no global generator is seeded, and none is set back."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = []
    for around in (isolated, isolated, nullcontext):
        with around():
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn == expected


def test_other_verbs_in_a_strange_world(pipeline: Path, plain: Path, recipe: tqdit.Recipe, tmp_path: Path) -> None:
    """Comparing, converting, diffusers' own loading and saving, and solving what was prepared in another world."""
    from diffusers import DiTTransformer2DModel

    def compared() -> str:
        found = tqdit.compare(pipeline, [plain], num=2, sampling=tqdit.Sampling("ddim", 2), samples=2, cost=False)
        assert not found.models[0].images.is_inference()
        return found.to_json()

    expected = compared()
    prepared = prepare(pipeline, recipe)
    with everything():
        before = state()
        assert compared() == expected
        solution, _ = solve_prepared(prepared, recipe)
        tqdit.load(plain).save_pretrained(tmp_path / "saved")
        tqdit.convert_checkpoint(pipeline, tmp_path / "official", official=True)
        assert state() == before
    with torch.inference_mode():
        model = DiTTransformer2DModel.from_pretrained(plain / "transformer")
    tensors = [*model.parameters(), *model.buffers(), *solution.codes.values(), *solution.floats.values()]
    tensors += [params.scale for params in solution.params.values()]
    assert not any(tensor.is_inference() for tensor in tensors)
    saved = contents(tmp_path / "saved")
    assert saved.pop("README.md")  # the card of a pipeline is the pipeline's
    assert saved == contents(plain / "transformer")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "official" / weights).read_bytes() == (pipeline / weights).read_bytes()


def test_threads_inside_at_once_share_one_state() -> None:
    """The one that leaves first leaves the other's world as it is."""
    first_left, both_inside = threading.Event(), threading.Barrier(2, timeout=20)
    seen: list[torch.dtype] = []

    def first() -> None:
        with isolated():
            both_inside.wait()
        first_left.set()

    def second() -> None:
        with isolated():
            both_inside.wait()
            first_left.wait(20)
            seen.append(torch.zeros(1).dtype)

    with default_dtype(torch.float16)():
        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() is torch.float16


def test_inside_again_is_one_world() -> None:
    with default_dtype(torch.float16)(), isolated():
        with isolated():
            assert torch.get_default_dtype() is torch.float32
        assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("at_first", [torch.float32, torch.float64])
def test_every_entry_isolates_and_the_last_setting_is_restored(at_first: torch.dtype) -> None:
    """A thread may change the process while another one is inside for hours."""
    with default_dtype(at_first)():
        with isolated():
            torch.set_default_dtype(torch.float16)
            with isolated():
                assert torch.get_default_dtype() is torch.float32
            assert torch.get_default_dtype() is torch.float32
        assert torch.get_default_dtype() is torch.float16


def test_without_autocast() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
        with without_autocast("cpu"):
            assert (a @ a).dtype is torch.float32
        assert (a @ a).dtype is torch.bfloat16
        assert isinstance(without_autocast("cuda"), nullcontext)
        with without_autocast("meta"):  # has none
            assert (a @ a).dtype is torch.bfloat16


def test_a_decorated_function_keeps_its_name_and_signature() -> None:
    import inspect

    assert tqdit.load.__name__ == "load"
    assert list(inspect.signature(tqdit.load).parameters) == ["model", "backend", "device", "dtype"]
    assert tqdit.load.__doc__.startswith("Load a transformer to run it")
