"""Every call of a converted model that cannot be right is refused in one line; what is no number stays none."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tqdit.errors import InputError
from tqdit.runtime.convert import convert

BACKENDS = ["cpu", "reference", "simulated"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", params=BACKENDS)
def integer(solved, request: pytest.FixtureRequest) -> nn.Module:
    return convert(solved("plus"), request.param)


@pytest.fixture
def inputs(model_inputs) -> dict[str, torch.Tensor]:
    return {name: x[:3].clone() for name, x in model_inputs.items()}


class Positional(nn.Module):
    """The model as tracers want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.model(x, t, y, return_dict=False)[0]


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", torch.zeros(3, 4, 8, 8), r"\(3, 4, 8, 8\), the model needs \(batch, 1, height, width\)"),
        ("hidden_states", torch.zeros(1, 8, 8), r"shape \(1, 8, 8\)"),
        ("hidden_states", torch.zeros(3, 1, 9, 8), "are 9 x 8; both must be multiples of 2"),
        ("hidden_states", torch.zeros(3, 1, 0, 8), "are 0 x 8; both must be multiples of 2"),
        ("hidden_states", torch.zeros(0, 1, 8, 8), "batch of 0 samples"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "floating point, not torch.uint8"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, dtype=torch.int64), "floating point, not torch.int64"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, dtype=torch.bool), "floating point, not torch.bool"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, dtype=torch.complex64), "floating point, not torch.complex64"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, dtype=torch.float8_e4m3fn), "floating point, not torch.float8"),
        ("hidden_states", torch.zeros(3, 1, 8, 8, device="meta"), "meta device has no values"),
        ("hidden_states", [[0.0]], "must be a tensor, not list"),
        ("timestep", NAN, r"timestep nan is outside \[0, 1000\)"),
        ("timestep", torch.tensor([1.0, NAN, 2.0]), r"timestep nan is outside \[0, 1000\)"),
        ("timestep", INF, "timestep inf is outside"),
        ("timestep", -0.5, "timestep -0.5 is outside"),
        ("timestep", -1, "timestep -1 is outside"),
        ("timestep", 1000, "timestep 1000 is outside"),
        ("timestep", 2**70, "must be a number or a tensor"),
        ("timestep", "7", "must be a number or a tensor, not '7'"),
        ("timestep", True, "must be real numbers, not torch.bool"),
        ("timestep", 3j, "must be real numbers, not torch.complex"),
        ("timestep", torch.zeros(3, device="meta"), "timestep: a tensor on the meta device"),
        ("class_labels", torch.tensor([1, 11, 2]), "class_labels has 11; the model's classes are 0 to 10"),
        ("class_labels", torch.tensor([1, -1, 2]), "class_labels has -1"),
        ("class_labels", torch.tensor([1.0, 2.0, 3.0]), "must be int64 or int32, not torch.float32"),
        ("class_labels", torch.tensor([True, False, True]), "must be int64 or int32, not torch.bool"),
        ("class_labels", torch.tensor([[1, 2, 3]]), r"shape \(1, 3\), the batch needs \(3,\)"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(integer, inputs, name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(integer, inputs | {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"timestep": 999.99999},  # 1000 in fp32
        {"timestep": torch.tensor(7, dtype=torch.uint8)},
        {"class_labels": torch.tensor([10, 0, 10], dtype=torch.int32)},
        {"hidden_states": torch.zeros(3, 1, 12, 12)},  # other sizes, as the float model
        {"hidden_states": torch.zeros(3, 1, 8, 8).half()},
        {"hidden_states": torch.zeros(3, 1, 8, 8).double()},
    ],
)
def test_unusual_inputs_that_are_right(integer, inputs, changed: dict[str, Any]) -> None:
    found = run(integer, inputs | changed)
    states = (inputs | changed)["hidden_states"]
    assert found.shape == (3, 2, *states.shape[2:])
    assert found.dtype is states.dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_tracers_that_would_keep_the_timestep_are_refused(integer, inputs, tracing: str) -> None:
    given = tuple(inputs.values())
    with torch.no_grad():
        with pytest.raises(InputError, match="make_fx cannot trace"):
            make_fx(Positional(integer), tracing_mode=tracing)(*given)
        with pytest.raises(InputError, match=r"torch\.jit and torch\.onnx cannot trace .*; use torch\.export"):
            torch.jit.trace(Positional(integer), given)
        with pytest.raises(InputError, match="cannot trace"):
            torch.onnx.export(Positional(integer), given, io.BytesIO(), dynamo=False)
        with pytest.raises(InputError, match="a FakeTensor has no values"):
            integer(**{name: FakeTensorMode().from_tensor(x) for name, x in inputs.items()})


def test_gradients_are_refused_not_made_up(integer, inputs) -> None:
    """Where gradients are off nothing asks for one; where they are on, one that is missing would be silent."""
    for name in ("hidden_states", "timestep"):
        asking = inputs | {name: inputs[name].float().clone().requires_grad_()}
        for given in (asking, asking | {name: asking[name] * 1}):
            with pytest.raises(InputError, match=f"no gradients; call the model under torch.no_grad.* detach {name}"):
                integer(**given)
        assert torch.isfinite(run(integer, asking)).all()
    assert not integer(**inputs).sample.requires_grad


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_sample_with_one_bad_pixel_is_nan_and_the_others_are_as_ever(integer, inputs, value: float) -> None:
    expected = run(integer, inputs)
    inputs["hidden_states"][1, 0, 3, 4] = value
    found = run(integer, inputs)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_stream_that_overflows_is_seen(integer, inputs) -> None:
    """Inf between two blocks would be codes like any other afterwards."""
    expected = run(integer, inputs)

    def overflow(_module: nn.Module, _given: object, stream: torch.Tensor) -> torch.Tensor:
        stream = stream.clone()
        stream[2, 5, 7] = INF
        return stream

    hook = integer.transformer_blocks[0].register_forward_hook(overflow)
    found = run(integer, inputs)
    hook.remove()
    assert found[2].isnan().all()
    assert torch.equal(found[:2], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_the_default_dtype_change_nothing(integer, inputs, dtype: torch.dtype) -> None:
    expected = run(integer, inputs)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(run(integer, inputs), expected)
    finally:
        torch.set_default_dtype(before)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(run(integer, inputs), expected)
        assert torch.equal(integer(**inputs).sample, expected)
        with torch.inference_mode():
            assert torch.equal(integer(**inputs).sample, expected)


def test_diffusers_can_skip_blocks(integer, inputs) -> None:
    from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

    before = run(integer, inputs)
    apply_layer_skip(integer, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    block = integer.transformer_blocks[0]
    assert not torch.equal(run(integer, inputs), before)
    HookRegistry.check_if_exists_or_initialize(block).remove_hook("layer_skip_hook", recurse=False)
    assert torch.equal(run(integer, inputs), before)
