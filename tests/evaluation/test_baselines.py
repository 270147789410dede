"""Baselines: what they compute, that torchao is really torchao, and what a denoiser call is."""

import importlib.util

import pytest
import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.evaluation import baselines
from tqdit.evaluation.baselines import DenoiserCall, build, check_families, missing
from tqdit.models.random_weights import random_float

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_dit) -> dict:
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(in_channels=4, out_channels=8).config}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """torch.compile that does not compile; the options it was given."""
    given: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: given.append(options) or model)
    return given


def test_families_are_known() -> None:
    check_families(("torchao", "float32"))
    with pytest.raises(InputError, match=r"'float16'.*float32, bfloat16, torchao"):
        check_families(("float32", "float16"))


def test_float32_is_the_float_model(config, eager) -> None:
    built = build(("float32-eager", "float32-compiled"), config, CPU)
    assert len(eager) == 1
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    for module in built.values():
        assert torch.equal(DenoiserCall(module, config, 4, CPU)(500), reference)
    assert built["float32-eager"].model is built["float32-compiled"].model, "the weights are there once"


def test_bfloat16_takes_and_gives_fp32(config) -> None:
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    module = build(("bfloat16-eager",), config, CPU)["bfloat16-eager"]
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    output = DenoiserCall(module, config, 4, CPU)(500)
    assert output.dtype is torch.float32
    error = (output - reference).norm() / reference.norm()
    assert 1e-4 < error < 0.1


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_torchao_quantizes_every_linear_layer_once(config, eager) -> None:
    module = build(("torchao-compiled",), config, CPU)["torchao-compiled"]
    linears = {m for m in module.modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 2 * 7 + 2 + 2, "the embedder's two are shared by the blocks"
    assert {type(m.weight).__module__.partition(".")[0] for m in linears} == {"torchao"}
    assert eager[0]["options"]["force_fuse_int_mm_with_mul"]
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    output = DenoiserCall(module, config, 4, CPU)(500)
    assert 1e-3 < (output - reference).norm() / reference.norm() < 0.1


def test_torchao_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert "tqdit[bench]" in (missing("torchao") or "")
    assert missing("float32") is None


@pytest.mark.parametrize(("batch", "null"), [(1, 0), (2, 1), (5, 2), (16, 8)])
def test_denoiser_call(config, batch: int, null: int) -> None:
    """Half of the labels are the null class; t is the argument; inputs stay the same."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x, timestep, class_labels, return_dict):
            seen.append((x, timestep, class_labels, return_dict))
            return (x * 2,)

    call = DenoiserCall(Spy(), config, batch, CPU)
    output = call(7)
    call(8)
    (x, t, labels, return_dict), (x2, t2, labels2, _) = seen
    assert x.shape == (batch, 4, 8, 8)
    assert torch.equal(output, 2 * x)
    assert (labels == config["num_embeds_ada_norm"]).sum() == null
    assert labels.max() <= config["num_embeds_ada_norm"]
    assert t.tolist() == [7] * batch
    assert t2.tolist() == [8] * batch
    assert (x2 is x, labels2 is labels, return_dict) == (True, True, False)
    assert x.is_inference(), "as in the sampler: torch.compile would compile again"
