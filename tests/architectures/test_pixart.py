"""PixArt from float to integers: its graph, calibration, masked cross-attention, saving, and diffusers' pipeline."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.registry import config_of, graph
from tqdit.architectures.shapes import shape_config, shape_names
from tqdit.calibration.recorder import record
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.provenance import Provenance
from tqdit.quality.metrics import sqnr_db
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.prompts import Prompts
from tqdit.sampling.trajectory import noise_generators, trajectory
from tqdit.search.solver import solve
from tqdit.spec import Role, Solution
from tqdit.timegroups import TimeGroups

TOKENS, WIDTH, PROMPTS = 7, 20, 4
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}


def float_model(**changed: Any) -> nn.Module:
    """diffusers' own test config of PixArt, smaller, with weights that make a difference."""
    config = {
        "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "caption_channels": WIDTH, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
        "attention_bias": True, "use_additional_conditions": False, **changed,
    }  # fmt: skip
    torch.manual_seed(1)
    model = PixArtTransformer2DModel(**config)
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.3
        scale = scale / 4 if name.startswith("proj_out") else scale  # or sampling would not stay near the data
        nn.init.normal_(parameter, std=scale)
    return model.eval().requires_grad_(False)


def prompts(**more: torch.Tensor) -> Prompts:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(PROMPTS, TOKENS)
    mask[1, 3:], mask[2, 1:] = 0, 0
    embeds = torch.randn(PROMPTS, TOKENS, WIDTH, generator=generator)
    embeds[mask == 0] = 6.0  # what is masked must not be seen
    null = torch.randn(1, TOKENS, WIDTH, generator=generator)
    return Prompts.checked({
        "prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt_embeds": null,
        "negative_prompt_attention_mask": torch.ones(1, TOKENS), **more,
    })  # fmt: skip


def inputs(given: Prompts, batch: int = 4) -> dict[str, Any]:
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"hidden_states": x, "timestep": torch.tensor([990, 600, 210, 5])[:batch], **given.rows(torch.arange(batch))}


def run(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).sample


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"groups": 4, "samples": 4, "steps": 20, "rounds": 1, "candidates": 12, **settings})


def solved(model: nn.Module, given: Prompts, **settings: Any) -> Solution:
    chosen = recipe(**settings)
    data, groups = collect(model, SCHEDULER, chosen, conditions=given), TimeGroups.uniform(0, 1000, 4)
    return solve(model, record(model, data, chosen), chosen, groups, Provenance(preset="plus"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return float_model()


@pytest.fixture(scope="module")
def solution(model) -> Solution:
    return solved(model, prompts())


def test_every_matmul_is_in_the_graph(model) -> None:
    found = graph(config_of(model))
    inside = {name for block in found.blocks for linear in block.linears for name in linear.modules}
    assert inside | set(found.float_input) == {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    first = found.blocks[0]
    assert [attention.context for attention in first.attentions] == [False, True]
    assert {o.name for o in first.operands if not o.timed} == {
        f"transformer_blocks.0.attn2.{name}" for name in ("kv_input", "key", "value")
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == dict(found.shapes)


@pytest.mark.parametrize("gelu", [{"gelu_grid": "row"}, {"gelu_grid": "mrq", "gelu_products": "two"}])
def test_rows_of_every_input_run_as_their_simulated_twin(model, gelu: dict[str, str]) -> None:
    """Masked cross-attention with softmax rows, and both ends in float."""
    given = prompts()
    found = solved(model, given, input_grid="row", attended_grid="row", softmax_grid="row", ends="float", **gelu)
    rows = {name for name, p in found.params.items() if p.spec.grid.per_row}
    expected = {"qkv_input", "q_input", "kv_input", "out_input", "softmax", "fc1_input"}
    assert {name.rpartition(".")[2] for name in rows} == expected | (
        {"fc2_input"} if gelu["gelu_grid"] == "row" else set()
    )
    assert {"pos_embed.proj.weight", "proj_out.weight"} <= set(found.floats)
    data = collect(model, SCHEDULER, recipe(seed=7), conditions=given)
    held = {"hidden_states": data.x, "timestep": data.t, **data.conditions.rows(data.labels)}
    reference, simulated = (run(convert(found, name), held) for name in ("reference", "simulated"))
    assert sqnr_db(run(model, held), reference) > 30
    assert sqnr_db(reference, simulated) > 50


def test_operands_of_a_prompt_have_one_time_group(solution) -> None:
    groups = {name: p.spec.groups for name, p in solution.params.items() if ".attn2." in name and not p.spec.is_weight}
    assert {name.rpartition(".")[2]: count for name, count in groups.items()} == {
        "q_input": 1, "kv_input": 1, "query": 4, "key": 1, "value": 1, "softmax": 1, "out_input": 4,
    }  # fmt: skip
    assert solution.params["transformer_blocks.0.attn2.key"].spec.role is Role.KEY


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_integers_are_close_to_float(model, solution, backend: str) -> None:
    """On held-out states of the float model's own sampling."""
    data = collect(model, SCHEDULER, recipe(seed=7), conditions=prompts())
    given = {"hidden_states": data.x, "timestep": data.t, **data.conditions.rows(data.labels)}
    assert sqnr_db(run(model, given), run(convert(solution, backend), given)) > 30


def test_backends_agree(solution) -> None:
    given = inputs(prompts())
    expected = run(convert(solution, "reference"), given)
    for backend in ("cpu", "simulated"):
        assert sqnr_db(expected, run(convert(solution, backend), given)) > 45


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masked_tokens_change_nothing(solution, backend: str) -> None:
    converted, given = convert(solution, backend), inputs(prompts())
    states = given["encoder_hidden_states"].clone()
    states[given["encoder_attention_mask"] == 0] = -3.0
    assert torch.equal(run(converted, given), run(converted, given | {"encoder_hidden_states": states}))
    assert not torch.equal(run(converted, given), run(converted, given | {"encoder_attention_mask": None}))
    bias = (1 - given["encoder_attention_mask"].float())[:, None] * -10000.0
    assert torch.equal(run(converted, given), run(converted, given | {"encoder_attention_mask": bias}))


def test_a_prompt_is_projected_once_and_again_when_it_changes(solution, monkeypatch) -> None:
    converted: Any = convert(solution, "cpu")
    block, made = converted.transformer_blocks[0], []
    monkeypatch.setattr(type(block), "context", _counted(type(block).context, made))
    given = inputs(prompts())
    first = run(converted, given)
    for t in (3, 700):
        run(converted, given | {"timestep": torch.full((4,), t)})
    assert len(made) == 2, "two blocks, one prompt"
    given["encoder_hidden_states"][0, 0] += 1
    assert not torch.equal(run(converted, given), first)
    assert len(made) == 4
    run(converted, {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()})
    assert len(made) == 6, "another tensor may be another prompt"


def _counted(function: Any, made: list[int]) -> Any:
    def counted(*arguments: Any) -> Any:
        made.append(1)
        return function(*arguments)

    return counted


def test_a_sample_does_not_depend_on_its_batch(solution) -> None:
    converted, given = convert(solution, "cpu"), inputs(prompts())
    together = run(converted, given)
    for i in range(4):
        part = {name: value[i : i + 1] for name, value in given.items() if isinstance(value, torch.Tensor)}
        assert torch.allclose(run(converted, part)[0], together[i], atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_attention_mask"])
def test_a_prompt_that_is_not_finite_gives_no_image(solution, bad: float, name: str) -> None:
    converted, given = convert(solution, "cpu"), inputs(prompts())
    if name == "encoder_attention_mask":
        given[name] = (1 - given[name].float())[:, None] * -10000.0
    given[name] = given[name].clone()
    given[name][1, 0, 0] = bad
    drawn = run(converted, given)
    assert drawn[1].isnan().all()
    assert drawn[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("buffers", [False, True])
def test_parts_may_be_sent_away(solution, buffers: bool) -> None:
    given = inputs(prompts())
    expected = run(convert(solution, "cpu"), given)
    away = accelerate.cpu_offload(convert(solution, "cpu"), "cpu", offload_buffers=buffers)
    assert torch.equal(run(away, given), expected)


def test_a_sampling_run_projects_its_prompts_once(solution, monkeypatch) -> None:
    converted: Any = convert(solution, "cpu")
    block, made = converted.transformer_blocks[0], []
    monkeypatch.setattr(type(block), "context", _counted(type(block).context, made))
    labels, sample = torch.tensor([0, 1]), registry.sample(config_of(converted))
    list(
        trajectory(
            converted, SCHEDULER, Sampling("ddim", 5, 4.5), labels, noise_generators(0, [0, 1]), prompts(), sample
        )
    )
    assert len(made) == 2, "two blocks"


def test_sizes_of_images_are_conditions() -> None:
    sizes = {"resolution": torch.tensor([[64.0, 48.0]]), "aspect_ratio": torch.tensor([[0.75]])}
    model = float_model(use_additional_conditions=True, num_layers=1)
    given = prompts(**sizes)
    converted, arguments = convert(solved(model, given, rounds=0), "cpu"), inputs(given)
    assert sqnr_db(run(model, arguments), run(converted, arguments)) > 20
    with pytest.raises(InputError, match="added_cond_kwargs"):
        converted(**{**arguments, "added_cond_kwargs": None})


@pytest.mark.parametrize(("name", "value", "message"), [
    ("encoder_hidden_states", None, "needs `encoder_hidden_states`"),
    ("encoder_hidden_states", torch.zeros(4, TOKENS, 3), r"have shape \(4, 7, 3\), the batch needs \(4, tokens, 20\)"),
    ("encoder_attention_mask", torch.ones(4, 2), r"has shape \(4, 2\)"),
    ("attention_mask", torch.ones(4, 16), "attention_mask is not supported"),
    ("cross_attention_kwargs", {"scale": 0.1}, "cross_attention_kwargs is not supported"),
    ("timestep", None, "needs `timestep`"),
    ("timestep", torch.full((4,), 1000), "outside"),
])  # fmt: skip
def test_bad_arguments_are_named(solution, name: str, value: Any, message: str) -> None:
    converted = convert(solution, "cpu")
    with pytest.raises(InputError, match=message):
        converted(**{**inputs(prompts()), name: value})


@pytest.mark.parametrize(("key", "value"), [
    ("norm_type", "layer_norm"), ("caption_channels", 0), ("cross_attention_dim", 32), ("num_layers", "2"),
    ("attention_type", "gated"),
])  # fmt: skip
def test_configs_that_are_not_supported_are_named(model, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key):
        graph(config_of(model) | {key: value})


def test_a_pipeline_of_diffusers_draws_with_it(model, solution, tmp_path: Path) -> None:
    """Save, load by diffusers, and run with prompt embeddings given as tensors: near what the float model draws."""
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=1, sample_size=16)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": DDIMScheduler(clip_sample=False)}
    convert(solution, "cpu").save_pretrained(tmp_path / "integer")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "integer")
    assert loaded.quantization_backend == "cpu"
    given, drawn = prompts(), []
    for transformer in (copy.deepcopy(model), loaded):
        pipeline = PixArtSigmaPipeline(transformer=transformer, **parts)
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(pipeline(
            prompt_embeds=given.embeds[:2], prompt_attention_mask=given.mask[:2], negative_prompt=None,
            negative_prompt_embeds=given.null_embeds.expand(2, -1, -1), num_inference_steps=4,
            negative_prompt_attention_mask=given.null_mask.expand(2, -1), generator=torch.Generator().manual_seed(4),
            output_type="latent", use_resolution_binning=False, height=8, width=8,
        ).images)  # fmt: skip
    assert torch.isfinite(drawn[1]).all()
    assert sqnr_db(*drawn) > 15


def test_the_published_shape_has_the_published_number_of_parameters() -> None:
    """0.6 B (PixArt-alpha, table 1), counted without building it."""
    assert "PixArt-XL/2" in shape_names()
    total = sum(shape.numel() for shape in graph(shape_config("PixArt-XL/2@1024")).shapes.values())
    assert total / 1e9 == pytest.approx(0.61, abs=0.01)
