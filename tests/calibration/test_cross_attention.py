"""Cross-attention with a mask, in a model of an architecture that a user adds."""

import pytest
import torch
from toy import CONTEXT, DIM, HEADS, KEPT, toy_data, toy_model

from tqdit.architectures import registry
from tqdit.calibration.recorder import record
from tqdit.calibration.statistics import kept_keys
from tqdit.sampling.guidance import arguments, predict
from tqdit.search.solver import solve
from tqdit.timegroups import TimeGroups


@pytest.fixture(autouse=True)
def _registered(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_LOCATIONS", dict(registry._LOCATIONS))
    registry.register("ToyTransformer", "toy:TOY")


def test_the_open_attention_computes_what_the_model_computes(tiny_recipe) -> None:
    model, data, outputs = toy_model(), toy_data(), []
    expected = predict(model, data.x, data.t, *arguments(data.conditions, data.labels, 1.5), 1.5)
    handle = model.last.register_forward_hook(lambda _, __, y: outputs.append(y.detach()))
    record(model, data, tiny_recipe(hessian=False), batch=len(data))
    handle.remove()
    cond, uncond = outputs[0][..., 0].reshape(16, 1, 4, 4).chunk(2)
    assert torch.allclose(torch.lerp(uncond, cond, 1.5), expected, atol=1e-5)


def test_records_of_a_context(tiny_recipe) -> None:
    model, data = toy_model(), toy_data()
    records = record(model, data, tiny_recipe(), batch=4)
    found = records.attentions["cross"]
    assert found.k.shape == found.v.shape == (len(found.q), HEADS, CONTEXT, DIM)
    assert found.bias.shape == (len(found.q), CONTEXT)
    masked = found.bias < 0
    assert masked.any()
    assert (found.fisher_scores.transpose(1, 3)[masked] == 0).all(), "nothing is weighed at a masked key"
    assert (found.fisher_scores.transpose(1, 3)[~masked] > 0).any()
    assert records.attentions["self_attention"].bias is None
    linear = records.linears["cross.context"]
    assert linear.group.unique().tolist() == [0]
    assert len(linear.x) == 2 * len(data) * CONTEXT
    assert set(records.linears["cross.input"].group.tolist()) == {0, 1, 2, 3}
    assert records.maxima.shape[1] == 1, "the report shows self-attention alone"


def test_masked_keys_do_not_spoil_ranges(tiny_recipe) -> None:
    model, data = toy_model(), toy_data()
    records = record(model, data, tiny_recipe(guidance=1.0), batch=4)
    context = model.table.weight[:2].unflatten(-1, (CONTEXT, 6))
    kept = torch.cat([context[label, : KEPT[label]] for label in (0, 1)])
    stats = records.ranges["cross.context"]
    assert stats.low.shape == (1, 1)
    assert (stats.low.item(), stats.high.item()) == (kept.min().item(), kept.max().item())
    keys = model.cross.to_k(kept).unflatten(-1, (HEADS, DIM))
    assert torch.allclose(records.ranges["cross.key"].high[0], keys.amax((0, 2)), atol=1e-5)


@pytest.mark.parametrize("hessian", ["none", "published"])
def test_masked_tokens_of_a_prompt_are_no_rows_of_its_layers(tiny_recipe, hessian: str) -> None:
    """They would fill the Hessian of the layers' inputs: here they are 100."""
    model, data = toy_model(), toy_data()
    linear = record(model, data, tiny_recipe(hessian=hessian), batch=4).linears["cross.context"]
    masked = (linear.x == 0).all(1)
    assert 0 < int(masked.sum()) < len(masked)
    assert linear.x.abs().max() < 10


def test_rows_of_a_prompt_are_of_tokens_that_count(tiny_recipe) -> None:
    """As long as there are enough of them; with their Fisher weights, in batches of any size."""
    model, data = toy_model(), toy_data()
    recipe = tiny_recipe(rows=2 * len(data), samples=1)
    few, all_at_once = (record(model, data, recipe, batch=size).linears["cross.context"] for size in (4, len(data)))
    assert len(few.x) == 2 * len(data)
    assert few.x.any(1).all()
    assert few.fisher.any(1).all()
    assert torch.equal(few.x.sort(0).values, all_at_once.x.sort(0).values)


def test_keys_that_count() -> None:
    bias = torch.tensor([[0.0, -10000.0, 0.0], [-10000.0, -10000.0, -10000.0]])
    assert kept_keys(bias).tolist() == [[True, False, True], [True, True, True]]
    assert kept_keys(None) is None


@pytest.mark.parametrize("hessian", [True, False])
def test_a_context_has_one_time_group(tiny_recipe, hessian: bool) -> None:
    model, data, recipe = toy_model(), toy_data(), tiny_recipe("plus", hessian=hessian, softmax_grid="mrq")
    solution = solve(model, record(model, data, recipe), recipe, TimeGroups.uniform(0, 1000, 4), {})
    groups = {name: params.spec.groups for name, params in solution.params.items()}
    assert groups["cross.context"] == groups["cross.key"] == groups["cross.value"] == 1
    assert groups["cross.query"] == groups["cross.softmax"] == groups["self_attention.key"] == 4
    assert solution.params["cross.context"].scale.item() * 255 < 20, "the masked tokens are 100"
