"""Around the blocks of a whole model on the CPU: its kernels, and no operation of torch that begins OpenMP's threads.

After one of those the threads of OpenMP look for work for a while, on cores that the kernels' own threads need.
"""

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tqdit.architectures.registry import config_of
from tqdit.backends import native
from tqdit.quality.metrics import sqnr_db
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.spec import Solution
from tqdit.speed.random_solution import random_solution

BOUND_DB = 45.0  # single codes that fall on the other side of a rounding boundary
PARALLEL = 32768  # numbers from which torch's operations on the CPU begin threads
LOOKUPS = "index_select", "embedding"  # they read some rows of a table
SIZES = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
DIT = SIZES | {"in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10}
pytestmark = pytest.mark.skipif(native.reason() is not None, reason="no compiled kernels here")


@functools.cache
def solved(preset: str, sample_size: int = 4) -> Solution:
    """Random codes for a DiT of one block; in `plus` the ends are in float, in `paper` they are codes."""
    return random_solution(config_of(DiTTransformer2DModel(**DIT, sample_size=sample_size)), Recipe(preset))


def inputs(sample_size: int = 4) -> dict[str, torch.Tensor]:
    x = torch.randn(3, 1, sample_size, sample_size, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": x, "timestep": torch.tensor([900, 100, 3]), "class_labels": torch.tensor([0, 3, 9])}


def run(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**given).sample


@pytest.fixture(params=["plus", "paper"])
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels around the blocks that are called."""
    names: list[str] = []
    call = native.call

    def noted(name: str, *arguments: Any) -> None:
        if "embed" in name:
            names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(native, "call", noted)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_call_of_dit(preset: str, called, dtype: torch.dtype) -> None:
    given = inputs()
    given["hidden_states"] = given["hidden_states"].to(dtype)
    found = run(convert(solved(preset), "cpu"), given)
    assert called == ["embed", "unembed"]
    assert found.dtype is dtype
    assert sqnr_db(run(convert(solved(preset), "reference"), given).float(), found.float()) > BOUND_DB


def test_a_call_of_pixart(called) -> None:
    sizes = {"sample_size": 4, "cross_attention_dim": 32, "caption_channels": 20, "use_additional_conditions": False}
    pixart = random_solution(config_of(PixArtTransformer2DModel(**SIZES | sizes)), Recipe())
    generator = torch.Generator().manual_seed(2)
    given = {"hidden_states": torch.randn(2, 4, 4, 4, generator=generator), "timestep": torch.tensor([900, 5]),
             "encoder_hidden_states": torch.randn(2, 5, 20, generator=generator)}  # fmt: skip
    found = run(convert(pixart, "cpu"), given)
    assert called == ["embed", "unembed"]
    assert sqnr_db(run(convert(pixart, "reference"), given), found) > BOUND_DB


def test_torch_has_nothing_large_to_do(preset: str) -> None:
    """It makes memory and views; the only operations that compute are on few numbers."""
    computed: dict[str, int] = {}

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
            if not func.is_view and not name.startswith(("empty", "new_empty")):
                touched = [out] if name in LOOKUPS else [*args, out]
                sizes = [x.numel() for x in touched if isinstance(x, torch.Tensor)]
                computed[name] = max(computed.get(name, 0), *sizes, 0)
            return out

    given = inputs(64)
    assert given["hidden_states"].shape[2] ** 2 // 4 * 32 >= PARALLEL  # tokens times width of one sample
    model = convert(solved(preset, 64), "cpu")
    run(model, given)
    with Noted():
        run(model, given)
    assert "index_select" in computed
    assert {name: size for name, size in computed.items() if size >= PARALLEL} == {}


@pytest.mark.parametrize(("name", "left"), [("pos_embed.proj", "embed"), ("norm_out", "unembed")])
def test_a_hook_runs(preset: str, called, name: str, left: str) -> None:
    """A hook of a module runs, also where kernels would take the place of the module."""
    model, calls = convert(solved(preset), "cpu"), []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    found = run(model, inputs())
    assert calls == [name]
    assert called == [other for other in ("embed", "unembed") if other != left]
    assert sqnr_db(run(convert(solved(preset), "reference"), inputs()), found) > BOUND_DB


def test_a_hook_of_a_class_of_ones_own_runs(preset: str, called) -> None:
    """accelerate's own hooks at most move tensors, which kernels wait for; a class derived from one may do anything."""

    class Doubled(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    model = convert(solved(preset), "cpu")
    expected = run(model, inputs())
    add_hook_to_module(model.norm_out, ModelHook())
    assert torch.equal(run(model, inputs()), expected)
    add_hook_to_module(model.norm_out, Doubled(), append=True)
    called.clear()
    assert not torch.equal(run(model, inputs()), expected)
    assert called == ["embed"]
    remove_hook_from_module(model.norm_out)
    assert torch.equal(run(model, inputs()), expected)
    assert called == ["embed", "embed", "unembed"]


def test_kernels_are_part_of_a_graph(preset: str, called) -> None:
    """A compiled model gives the same numbers; hooks of modules run there, too."""
    torch.compiler.reset()
    model = convert(solved(preset), "cpu")
    expected = run(model, inputs())
    called.clear()
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="eager"), inputs()), expected)
    assert called == ["embed", "unembed"]
    torch.compiler.reset()
    model.norm_out.register_forward_hook(lambda module, given, out: out * torch.nan)
    assert run(torch.compile(model, backend="eager"), inputs()).isnan().all()
    assert called == ["embed", "unembed", "embed"]


def test_latents_of_another_size(preset: str, called) -> None:
    """Their positions are in no table; the last layer needs none."""
    given = inputs() | {"hidden_states": torch.randn(3, 1, 6, 4, generator=torch.Generator().manual_seed(3))}
    found = run(convert(solved(preset), "cpu"), given)
    assert called == ["unembed"]
    assert sqnr_db(run(convert(solved(preset), "reference"), given), found) > BOUND_DB


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_with_a_bad_pixel_is_nan(preset: str, bad: float) -> None:
    given, model = inputs(), convert(solved(preset), "cpu")
    expected = run(model, given)
    given["hidden_states"][1, 0, 3, 2] = bad
    found = run(model, given)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
