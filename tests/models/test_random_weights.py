"""Random weights: not degenerate, of the right dtype, the embedder shared."""

import pytest
import torch

from tqdit.architectures.building import empty_model
from tqdit.architectures.registry import architecture
from tqdit.errors import InputError
from tqdit.speed.random_weights import Pool, random_float


@pytest.fixture
def config(tiny_dit) -> dict:
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(in_channels=4, out_channels=8).config}


def output(model: torch.nn.Module) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 4, 8, 8).to(dtype)
    labels, t = torch.arange(8), torch.arange(8) * 100
    with torch.inference_mode():
        return model(x, timestep=t, class_labels=labels, return_dict=False)[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_float_computes_something(config, dtype: torch.dtype) -> None:
    model = random_float(config, dtype)
    y = output(model)
    assert y.shape == (8, 8, 8, 8)
    assert torch.isfinite(y).all()
    assert 0.3 < y.std() < 4, "unit variance, so that no value is special"
    assert (y[0] - y[1]).std() > 0.1, "it depends on t and class"
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {dtype}
    assert not model.training


def test_seeded(config) -> None:
    a, b, c = (random_float(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["proj_out_1.weight"], c["proj_out_1.weight"])


def test_blocks_share_one_embedder_and_nothing_else(config) -> None:
    first, second = random_float(config).transformer_blocks
    assert first.norm1.emb is second.norm1.emb
    assert not torch.equal(first.norm1.linear.weight, second.norm1.linear.weight)
    assert not torch.equal(first.attn1.to_q.weight, first.attn1.to_k.weight)


def test_the_twin_of_a_parameter() -> None:
    twin = architecture("DiTTransformer2DModel").twin
    name = "norm1.emb.timestep_embedder.linear_1.weight"
    assert twin(f"transformer_blocks.17.{name}") == f"transformer_blocks.0.{name}"
    for own in (f"transformer_blocks.0.{name}", "transformer_blocks.3.norm1.linear.weight", "pos_embed.proj.bias"):
        assert twin(own) == own


def test_pool_deals_out_copies() -> None:
    pool = Pool(100, seed=0)
    a, b = pool.take(torch.Size((10, 10))), pool.take(torch.Size((10, 10)))
    assert not torch.equal(a, b)
    a.zero_()
    assert (pool.values == 0).sum() == 0
    assert pool.take(torch.Size((100,)), pool.values.to(torch.int8)).dtype is torch.int8


def test_empty_model_refuses_other_architectures(config) -> None:
    with pytest.raises(InputError, match="UNet"):
        empty_model({**config, "_class_name": "UNet2DModel"})
