"""Records of the float model: its true operands, every group, and a model left as it was."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from tqdit.architectures.interface import Block
from tqdit.architectures.registry import config_of, graph
from tqdit.architectures.shapes import shape_config
from tqdit.calibration.picker import Picker
from tqdit.calibration.recorder import batch_size, picked_bytes, record
from tqdit.calibration.records import Joined, LinearRecord, channels_of
from tqdit.calibration.store import InMemory
from tqdit.errors import InputError
from tqdit.plan import sites
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import arguments, predict
from tqdit.spec import Role

Q, K, V, P = Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX


def site_name(block: Block, role: Role) -> str:
    """The site of an attention's operand."""
    return next(found.name for found in block.attentions[0].operands if found.role is role)


@torch.inference_mode()
def inputs_of(model: nn.Module, names: list[str], data, guidance: float) -> dict[str, torch.Tensor]:
    """Inputs of modules in a guided call over all of `data`, conditional halves first."""
    found, handles = {}, []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0].clone()})
            )
        )
    predict(model, data.x, data.t, *arguments(data.conditions, data.labels, guidance), guidance)
    for handle in handles:
        handle.remove()
    return found


def split_heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:2], 2, 16).transpose(1, 2)


def test_ranges_are_those_of_every_value(model, data, records, tiny_recipe) -> None:
    groups = data.group.repeat(2)
    for block in graph(config_of(model)).blocks:
        modules = [group.modules[0] for group in block.linears]
        seen = inputs_of(model, modules, data, 1.5)
        attn = model.get_submodule(block.attentions[0].module)
        x = seen[modules[0]]
        q, k, v = (split_heads(layer(x)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        values = {group.source.name: seen[group.modules[0]] for group in block.linears}
        values |= {site_name(block, Q): q, site_name(block, K): k, site_name(block, V): v}
        values[site_name(block, P)] = (q @ k.mT / 4).softmax(-1)
        for name, value in values.items():
            stats = records.ranges[name]
            for g in range(4):
                dims = (0, 2, 3) if value.ndim == 4 else (0, 1, 2)
                members = value[groups == g]
                assert torch.allclose(stats.low[g], members.amin(dims), atol=1e-5), name
                assert torch.allclose(stats.high[g], members.amax(dims), atol=1e-5), name


def test_every_activation_site_has_ranges(model, records, tiny_recipe) -> None:
    """And every channel of the values after GELU."""
    found = [site for site in sites(config_of(model), tiny_recipe()) if not site.is_weight]
    channels = {channels_of(site.name): site.name for site in found if site.role is Role.GELU}
    assert set(records.ranges) == {*channels, *(site.name for site in found)}
    for stats in records.ranges.values():
        assert torch.isfinite(stats.low).all()
        assert (stats.high > stats.low).all()
    for name, whole in channels.items():
        assert records.ranges[name].low.shape == (4, 128)
        assert torch.equal(records.ranges[name].over_units().low, records.ranges[whole].low)
        assert torch.equal(records.ranges[name].over_units().high, records.ranges[whole].high)


def test_rows_are_rows_of_the_input_in_their_group(model, data, records) -> None:
    block = graph(config_of(model)).blocks[1]
    for group in block.linears:
        seen = inputs_of(model, [group.modules[0]], data, 1.5)[group.modules[0]]
        linear = records.linears[group.source.name]
        assert linear.x.shape == (256, seen.shape[-1])
        assert linear.group.bincount().tolist() == [64] * 4
        for row, g in zip(linear.x[::17], linear.group[::17], strict=True):
            nearest = (seen - row).abs().amax(-1)  # (2 S, tokens)
            sample = int(nearest.amin(1).argmin())
            assert nearest.min() < 1e-4
            assert data.group.repeat(2)[sample] == g
        outputs = sum(model.get_submodule(name).out_features for name in group.modules)
        assert linear.fisher.shape == (256, outputs)


def test_attention_records_are_whole_keys_and_values(model, records) -> None:
    for attention in records.attentions.values():
        s, h, queries, d = attention.q.shape
        assert (h, d) == (2, 16)
        assert attention.k.shape == attention.v.shape == (s, 2, 16, 16)
        assert attention.fisher_scores.shape == (s, 2, queries, 16)
        assert attention.fisher_values.shape == attention.q.shape
        assert len(attention.group) == s


@pytest.mark.parametrize(("samples", "queries"), [(4, 64), (4, 256), (6, 32), (3, 1), (5, 200)])
def test_attention_records_have_every_group_and_both_halves(
    model, scheduler_config, tiny_recipe, samples: int, queries: int
) -> None:
    from tqdit.calibration.trajectories import collect

    recipe = tiny_recipe(samples=samples, queries=queries, hessian=False)
    data = collect(model, scheduler_config, recipe)
    records = record(model, data, recipe, batch=len(data))
    module = "transformer_blocks.0.attn1.to_q"
    q = split_heads(model.get_submodule(module)(inputs_of(model, [module], data, 1.5)[module]))
    attention = records.attentions["transformer_blocks.0.attn1"]
    sources = []
    for i in range(len(attention.q)):
        distance = (q - attention.q[i][:, :1]).abs().sum((1, 3)).amin(-1)  # to every sample's tokens
        sources.append(int(distance.argmin()))
        assert distance.min() < 1e-3
    halves = torch.tensor(sources) >= len(data)
    for g in range(4):
        assert set(halves[attention.group == g].tolist()) == {False, True}, f"group {g}"


def test_model_is_left_as_it_was(tiny_dit, data, tiny_recipe) -> None:
    model = tiny_dit()

    def output() -> torch.Tensor:
        return model(data.x, timestep=data.t, class_labels=data.labels).sample

    before = output()
    processors = [block.attn1.processor for block in model.transformer_blocks]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record(model, data, tiny_recipe())
    assert [block.attn1.processor for block in model.transformer_blocks] == processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert torch.equal(output(), before)


def test_model_is_left_as_it_was_after_an_error(tiny_dit, data, tiny_recipe) -> None:
    model = tiny_dit()
    processors = [block.attn1.processor for block in model.transformer_blocks]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, data, tiny_recipe(), interrupt)
    assert [block.attn1.processor for block in model.transformer_blocks] == processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_observed_model_computes_what_the_model_computes(tiny_dit, data, tiny_recipe) -> None:
    """The recording attention is the model's attention: same output while it watches."""
    model, outputs = tiny_dit(), []
    handle = model.proj_out_2.register_forward_hook(lambda _, __, y: outputs.append(y.detach()))
    record(model, data, tiny_recipe(hessian=False), batch=len(data))
    predict(model, data.x, data.t, *arguments(data.conditions, data.labels, 1.5), 1.5)
    handle.remove()
    assert torch.allclose(*outputs, atol=1e-5)


def test_batch_size_changes_nothing(model, data, records, tiny_recipe) -> None:
    for batch in (3, 16):
        other = record(model, data, tiny_recipe(), batch=batch)
        for name, stats in records.ranges.items():
            assert torch.allclose(other.ranges[name].low, stats.low, atol=1e-5), name
            assert torch.allclose(other.ranges[name].high, stats.high, atol=1e-5), name
        for name, linear in records.linears.items():
            total = other.linears[name].fisher.sum(0)
            assert torch.allclose(total, linear.fisher.sum(0), rtol=1e-3), name
            assert torch.allclose(other.linears[name].x.sum(0), linear.x.sum(0), atol=1e-3), name


def test_without_hessian_all_weights_are_one(model, data, tiny_recipe) -> None:
    for linear in record(model, data, tiny_recipe(hessian=False)).linears.values():
        assert (linear.fisher == 1).all()


def test_guidance_of_one_records_the_conditional_half(model, data, tiny_recipe) -> None:
    records = record(model, data, tiny_recipe(guidance=1.0, rows=10**6))
    assert {len(linear.x) for linear in records.linears.values()} == {len(data) * 16}


def test_maxima_are_the_largest_probabilities_per_key_of_the_conditional_halves(model, data, records) -> None:
    assert records.t is data.t
    assert records.maxima.shape == (16, 2, 2 * 16)
    for index, block in enumerate(graph(config_of(model)).blocks):
        name = block.linears[0].modules[0]
        x = inputs_of(model, [name], data, 1.5)[name][: len(data)]
        attn = model.get_submodule(block.attentions[0].module)
        p = (split_heads(attn.to_q(x)) @ split_heads(attn.to_k(x)).mT / 4).softmax(-1)
        assert torch.allclose(records.maxima[:, index], p.amax(2).flatten(1), atol=1e-5)


def test_probe_noise_is_not_the_noise_of_the_trajectories(model, data, tiny_recipe, monkeypatch) -> None:
    from tqdit.calibration.fisher import Probes
    from tqdit.sampling.trajectory import noise_generators

    seen: list[torch.Tensor] = []
    original = Probes.run

    def spy(self, output, source, noise):
        seen.append(noise)
        original(self, output, source, noise)

    monkeypatch.setattr(Probes, "run", spy)
    record(model, data, tiny_recipe())
    probes = torch.cat(seen, 1)[0]
    assert len(probes) == len(data)
    assert probes.std() == pytest.approx(1, abs=0.1)
    for index, generator in enumerate(noise_generators(0, range(len(data)))):
        assert not torch.equal(torch.randn(1, 8, 8, generator=generator), probes[index])


def test_parts_of_batches_are_joined_when_asked_for(model, data, records, tiny_recipe) -> None:
    assert set(records.linears) == {
        group.source.name for block in graph(config_of(model)).blocks for group in block.linears
    }
    assert len(records.attentions) == 2
    with pytest.raises(KeyError):
        records.linears["transformer_blocks.0"]
    assert len(record(model, data, tiny_recipe(), batch=3).linears["transformer_blocks.1.ff.fc1_input"].x) == 256


def test_a_device_without_memory_for_a_batch_takes_smaller_ones(model, data, records, tiny_recipe, monkeypatch) -> None:
    from tqdit.calibration.recorder import _Pass

    original, sizes = _Pass.run, []

    def small(self, *given):
        sizes.append(len(self.members))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError
        return original(self, *given)

    monkeypatch.setattr(_Pass, "run", small)
    found = record(model, data, tiny_recipe())
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    for name, stats in records.ranges.items():
        assert torch.allclose(found.ranges[name].low, stats.low, atol=1e-5)
        assert torch.allclose(found.ranges[name].high, stats.high, atol=1e-5)
    for name, linear in records.linears.items():
        assert torch.allclose(found.linears[name].fisher.sum(0), linear.fisher.sum(0), rtol=1e-3)
        assert found.linears[name].group.bincount().tolist() == linear.group.bincount().tolist()


@pytest.mark.parametrize(
    ("device", "shape", "samples", "batch"),
    [
        ("cpu", "DiT-XL/2", 32, 4), ("cpu", "DiT-XL/2", 1, 2), ("cpu", "DiT-XL/2@512", 32, 1),
        ("cpu", "DiT-S/8", 32, 8), ("cuda", "DiT-XL/2", 32, 8), ("cuda", "DiT-XL/2@512", 32, 1),
    ],
)  # fmt: skip
def test_a_pass_takes_what_its_budget_allows(device: str, shape: str, samples: int, batch: int) -> None:
    config, recipe = shape_config(shape), Recipe("paper", samples=samples)
    picker = Picker(recipe, recipe.groups * samples, 2, (config["sample_size"] // config["patch_size"]) ** 2)
    assert batch_size(graph(config), picker, torch.device(device)) == batch


def test_picked_bytes_are_those_of_the_records(model, data, records, tiny_recipe) -> None:
    parts = [*records.linears.values(), *records.attentions.values()]
    labels = ("group", "step_weight", "image_weight")
    held = sum(t.nbytes for part in parts for name, t in vars(part).items() if t is not None and name not in labels)
    assert picked_bytes(graph(config_of(model)), Picker(tiny_recipe(), len(data), 2, 16)) * len(data) == held


def test_records_are_put_together_on_their_device() -> None:
    """ "meta" stands for a GPU."""
    parts = [InMemory({f"a/{field.name}": torch.ones(2, 3) for field in fields(LinearRecord)}) for _ in range(2)]
    record = Joined(LinearRecord, ["a"], parts, torch.device("meta"))["a"]
    assert all(tensor.device.type == "meta" and tensor.shape == (4, 3) for tensor in vars(record).values())


# Values that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_site_and_timestep_that_are_not_finite_are_named(
    model, data, tiny_recipe, value: float, guidance: float, hessian: bool
) -> None:
    x = data.x.clone()
    x[9, 0, 3, 3] = value
    name = graph(config_of(model)).blocks[0].linears[0].source.name
    where = rf"site '{name}': .* timestep {int(data.t[9])} \(time group {int(data.group[9])} of 4\)"
    with pytest.raises(InputError, match=where):
        record(model, replace(data, x=x), tiny_recipe(guidance=guidance, hessian=hessian), batch=4)


def test_a_layer_that_overflows_is_named(tiny_dit, data, tiny_recipe) -> None:
    """The input of the layer that follows: its own input is fine, and so are all before."""
    model = tiny_dit()
    block = graph(config_of(model)).blocks[1]
    with torch.no_grad():
        model.get_submodule(block.linears[2].modules[0]).weight.mul_(1e38)
    with pytest.raises(InputError, match=f"site '{block.linears[3].source.name}'"):
        record(model, data, tiny_recipe())
