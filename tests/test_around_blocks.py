"""Around the blocks of a whole model on the GPU backend: the kernels that a call launches, and when it leaves them."""

import copy
import functools
import pickle
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tqdit.architectures import patches
from tqdit.architectures.registry import config_of
from tqdit.layers import conditioning
from tqdit.quality.metrics import sqnr_db
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.spec import Solution
from tqdit.speed.random_solution import random_solution

pytest.importorskip("triton")
from tqdit.backends.triton import deviations
from tqdit.backends.triton.layouts import FLASH, Config
from tqdit.backends.triton.relaunch import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND_DB = 45.0  # single codes that fall on the other side of a rounding boundary
EMBEDDER, ADALN = ["activated_kernel"] * 2, ["float_input_kernel"]
FIRST, LAST = ["embed_kernel"], ["unembed_kernel", "poison_kernel"]
AROUND = [*EMBEDDER, *ADALN, *FIRST, *ADALN, *LAST]
VIEWS = {"view", "flatten", "expand", "select", "slice", "split", "alias", "_unsafe_view", "unsqueeze", "as_strided"}
MEMORY = {"empty", "new_empty", "empty_like", "detach"}
SIZES = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 4}
inputs_of_dit: dict[str, torch.Tensor] = {
    "hidden_states": torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([900, 100, 3]), "class_labels": torch.tensor([0, 3, 9]),
}  # fmt: skip


@functools.cache
def solved(preset: str) -> Solution:
    """Random codes for a DiT of one block; in `plus` the ends are in float, in `paper` they are codes."""
    sizes = SIZES | {"in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10}
    return random_solution(config_of(DiTTransformer2DModel(**sizes)), Recipe(preset))


@pytest.fixture(params=["plus", "paper"])
def either(request: pytest.FixtureRequest) -> Solution:
    return solved(request.param)


@pytest.fixture
def solution() -> Solution:
    return solved("plus")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that plans launch: those of the blocks of these models are launched without plans."""
    names: list[str] = []
    launch = Plan.launch

    def noted(plan: Plan, *given: Any) -> None:
        names.append(plan.kernel.fn.__name__)
        launch(plan, *given)

    monkeypatch.setattr(Plan, "launch", noted)
    return names


def converted(solution: Solution, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = convert(solution, "triton", DEVICE, dtype)
    model.runtime.graphs = False
    return model


def run(model: nn.Module, **given: Any) -> torch.Tensor:
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in (inputs_of_dit | given).items()}
    with torch.inference_mode():
        return model(**given).sample.cpu()


def reference(solution: Solution, dtype: torch.dtype = torch.float32, **given: Any) -> torch.Tensor:
    with torch.inference_mode():
        return convert(solution, "reference", "cpu", dtype)(**(inputs_of_dit | given)).sample


def test_a_call_of_dit_launches_seven_kernels_around_its_blocks(either, launched) -> None:
    found = run(converted(either, torch.bfloat16))
    assert launched == AROUND
    assert len(launched) == 7
    assert sqnr_db(reference(either, torch.bfloat16), found) > BOUND_DB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latents_of_any_dtype(solution, launched, dtype: torch.dtype) -> None:
    x = inputs_of_dit["hidden_states"].to(dtype)
    found = run(converted(solution), hidden_states=x)
    assert launched == AROUND
    assert found.dtype is dtype
    assert sqnr_db(reference(solution, hidden_states=x).float(), found.float()) > BOUND_DB


def test_nothing_is_launched_between_them(either, monkeypatch) -> None:
    """torch makes memory and views, and no operation that would be a kernel."""
    monkeypatch.setattr(Plan, "launch", lambda *_: None)  # the interpreter copies
    seen: set[str] = set()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    model: Any = converted(either)
    x, t, labels = (value.to(DEVICE) for value in inputs_of_dit.values())
    shift_scale = torch.zeros(3, 64, device=DEVICE)
    with torch.inference_mode(), Noted():
        assert conditioning._activated(model.conditioning.embedders[0], t, labels) is not None
        stream = patches.embedded(model.pos_embed, x, 2, torch.bfloat16)
        patches.output(model, model.proj_out_2, stream, shift_scale, x)
    assert seen <= VIEWS | MEMORY, seen - VIEWS - MEMORY


def test_a_call_of_pixart(launched) -> None:
    sizes = {"cross_attention_dim": 32, "caption_channels": 20, "use_additional_conditions": False}
    pixart = random_solution(config_of(PixArtTransformer2DModel(**SIZES | sizes)), Recipe())
    generator = torch.Generator().manual_seed(2)
    given = {"hidden_states": torch.randn(2, 4, 4, 4, generator=generator), "timestep": torch.tensor([900, 5]),
             "encoder_hidden_states": torch.randn(2, 5, 20, generator=generator)}  # fmt: skip
    with torch.inference_mode():
        expected = convert(pixart, "reference")(**given).sample
        found = converted(pixart)(**{name: x.to(DEVICE) for name, x in given.items()}).sample.cpu()
    assert [name for name in launched if "embed" in name or "poison" in name] == [*FIRST, *LAST]
    assert sqnr_db(expected, found) > BOUND_DB


@pytest.mark.parametrize(
    ("name", "missing", "way"),
    [
        ("pos_embed", FIRST, "hook"), ("pos_embed.proj", FIRST, "before"), ("norm_out", LAST, "before"),
        ("proj_out_2", LAST, "hook"), ("proj_out_2", LAST, "replaced"), ("conditioning.embedders.0", EMBEDDER, "hook"),
        ("conditioning.embedders.0.class_embedder", EMBEDDER, "hook"),
        ("conditioning.embedders.0.timestep_embedder.linear_1", EMBEDDER, "before"),
    ],
)  # fmt: skip
def test_a_hook_runs(solution, launched, name: str, missing: list[str], way: str) -> None:
    """Of a module that kernels would not call; accelerate puts another function in the place of a forward."""
    model, calls = converted(solution), []
    module = model.get_submodule(name)
    if way == "hook":
        module.register_forward_hook(lambda *_: calls.append(name))
    elif way == "before":
        module.register_forward_pre_hook(lambda *_: calls.append(name))
    else:
        forward = module.forward
        module.forward = lambda x: calls.append(name) or forward(x)
    found = run(model)
    assert calls
    assert not set(missing) & set(launched)
    assert sqnr_db(reference(solution), found) > BOUND_DB


def test_a_hook_on_all_modules_runs(solution, launched) -> None:
    """As a counter of calls registers it with torch, on no module in particular."""
    model, seen = converted(solution), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        found = run(model)
    finally:
        handle.remove()
    assert {model.pos_embed, model.pos_embed.proj, model.norm_out, model.conditioning.embedders[0]} <= set(seen)
    assert not {*EMBEDDER, *FIRST, *LAST} & set(launched)
    assert sqnr_db(reference(solution), found) > BOUND_DB


def test_parts_that_are_sent_away_are_left_to_their_modules(solution, launched) -> None:
    expected = run(converted(solution))
    launched.clear()
    away = accelerate.cpu_offload(converted(solution), DEVICE, offload_buffers=True)
    found = run(away)
    assert not {*EMBEDDER, *FIRST, *LAST} & set(launched)
    assert sqnr_db(expected, found) > BOUND_DB


def test_latents_of_another_size(solution, launched) -> None:
    """Their positions are in no table; the last layer needs none."""
    x = torch.randn(3, 1, 6, 4, generator=torch.Generator().manual_seed(3))
    found = run(converted(solution), hidden_states=x)
    assert not set(FIRST) & set(launched)
    assert launched[-2:] == LAST
    assert found.shape == (3, 2, 6, 4)
    assert sqnr_db(reference(solution, hidden_states=x), found) > BOUND_DB


@pytest.mark.parametrize("changed", [{"timestep": torch.tensor([900.5, 100.25, 3.0])}, {"timestep": 431}])
def test_other_timesteps(solution, launched, changed: dict[str, Any]) -> None:
    found = run(converted(solution), **changed)
    assert launched == AROUND
    assert sqnr_db(reference(solution, **changed), found) > BOUND_DB


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_with_a_bad_pixel_is_nan(solution, bad: float) -> None:
    x = inputs_of_dit["hidden_states"].clone()
    x[1, 0, 3, 2] = bad
    model = converted(solution)
    found, expected = run(model, hidden_states=x), run(model)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_copy_has_the_kernels(solution, launched) -> None:
    model = converted(solution)
    expected = run(model)
    launched.clear()
    assert torch.equal(run(pickle.loads(pickle.dumps(copy.deepcopy(model)))), expected)
    assert launched == AROUND


def test_the_reference_has_none(solution, launched) -> None:
    assert reference(solution).isfinite().all()
    assert not launched


def test_the_report_of_a_model_follows_its_calls(solution, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked after calls of which it says something; what runs are recorded by stays as it was."""
    monkeypatch.setattr(deviations, "_TAKEN", {kind: {} for kind in deviations.KINDS})
    model: Any = converted(solution)
    before, recorded = model.quantization_report, dict(model.site_kernels)
    assert before == recorded
    deviations.note(Config(64, 0, 128, hopper=FLASH), 4096, 4096, 72)
    said = "; in one pass over the keys for 4096 x 4096 x 72 (queries, keys, head_dim)"
    for kept in (model, pickle.loads(pickle.dumps(model))):
        after = kept.quantization_report
        changed = {site: kernel for site, kernel in after.items() if kernel != before[site]}
        assert {site.rpartition(".")[2] for site in changed} == {"query", "key", "value", "softmax"}
        assert all(kernel == f"{before[site][:-1]}{said}]" for site, kernel in changed.items())
    assert converted(solution).site_kernels == model.site_kernels == recorded
