"""Models of prompts, flow matching and visited time groups in every verb, by path, in memory and by command."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import nn

import tqdit
from tqdit.cli.main import main
from tqdit.errors import RepairWarning
from tqdit.plan import plan
from tqdit.recipe import Recipe
from tqdit.sources.conditions import is_prompted
from tqdit.stages import states_sha256
from tqdit.timegroups import TimeGroups

PROMPTS, TOKENS, WIDTH = 3, 5, 6
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FAST = ["--groups", "2", "--samples", "2", "--steps", "8", "--rounds", "1", "--quiet"]


@pytest.fixture(scope="module")
def text_model() -> nn.Module:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=4,
        cross_attention_dim=16, caption_channels=WIDTH, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() if parameter.ndim > 1 else 9) ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text_pipeline(text_model, scheduler_config, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text") / "tiny-text"
    text_model.save_pretrained(root / "transformer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    return root


def embeddings(seed: int = 0, width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(PROMPTS, TOKENS, width, generator=generator),
        "prompt_attention_mask": torch.ones(PROMPTS, TOKENS, dtype=torch.int64),
        "negative_prompt_embeds": torch.randn(1, TOKENS, width, generator=generator),
        "negative_prompt_attention_mask": torch.tensor([[1, 0, 0, 0, 0]]),
    }


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.safetensors"
    save_file(embeddings(), path)
    return path


@pytest.fixture(scope="module")
def prompts(prompts_file) -> tqdit.Prompts:
    return tqdit.Prompts.read(prompts_file)


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    return tiny_recipe("plus", groups=2, samples=2, steps=8, rounds=1)


def equal(a: tqdit.Solution, b: tqdit.Solution) -> bool:
    same = [torch.equal(codes, b.codes[name]) for name, codes in a.codes.items()]
    return all([*same, *(torch.equal(params.scale, b.params[name].scale) for name, params in a.params.items())])


# Prompts -------------------------------------------------------------------------------------------------------------


def test_a_model_knows_whether_it_is_of_prompts(text_model, model) -> None:
    assert is_prompted({**text_model.config, "_class_name": "PixArtTransformer2DModel"})
    assert not is_prompted({**model.config, "_class_name": "DiTTransformer2DModel"})


def test_every_verb_in_python(text_pipeline, text_model, scheduler_config, prompts, recipe, tmp_path) -> None:
    out = tmp_path / "w8a8"
    tqdit.quantize(text_pipeline, out, recipe, conditions=prompts)
    made = tqdit.load(out).solution
    in_memory = tqdit.quantize(text_model, recipe, scheduler=scheduler_config, conditions=prompts)
    assert equal(in_memory.solution, made)
    states = tqdit.calibration_states(text_model, recipe, scheduler=scheduler_config, conditions=prompts)
    assert states.conditions is prompts
    mine = tqdit.CalibrationSet(
        states.x, states.t, states.labels, image_weight=states.image_weight, conditions=prompts,
        scheduler=scheduler_config, groups=2,
    )  # fmt: skip
    solution = tqdit.solve(text_model, tqdit.calibrate(text_model, mine, recipe), recipe)
    assert equal(solution, made)
    other = tqdit.Prompts.checked(embeddings(seed=1))
    assert solution.provenance.calibration_sha256 == made.provenance.calibration_sha256
    assert states_sha256(mine) != states_sha256(
        tqdit.CalibrationSet(states.x, states.t, states.labels, conditions=other)
    )
    sampling = tqdit.Sampling(steps=2)
    images = tqdit.sample(out, [2, "0"], 2, sampling, conditions=prompts)
    again = tqdit.sample(out, (), 3, sampling, conditions=prompts)
    assert images.shape == (2, 1, 4, 4)
    assert again.shape == (3, 1, 4, 4)
    compared = tqdit.compare(text_pipeline, [out], 2, sampling, 1, conditions=prompts, cost=False)
    assert compared.settings["sampler"] == "ddim"
    assert compared.models[0].eps.overall > 10


def test_conditions_that_do_not_suit(text_pipeline, text_model, pipeline, model, scheduler_config, prompts, recipe):
    wide = tqdit.Prompts.checked(embeddings(width=8))
    without = r"a PixArtTransformer2DModel is sampled under prompts; give conditions, such as tqdit"
    with pytest.raises(tqdit.InputError, match=without):
        tqdit.sample(text_pipeline, num=1)
    with pytest.raises(tqdit.InputError, match=without):
        tqdit.quantize(text_model, recipe, scheduler=scheduler_config)
    with pytest.raises(tqdit.InputError, match="a DiTTransformer2DModel is sampled under classes; it has no use for"):
        tqdit.quantize(model, recipe, scheduler=scheduler_config, conditions=prompts)
    with pytest.raises(tqdit.InputError, match="under classes"):
        tqdit.compare(pipeline, [], conditions=prompts)
    with pytest.raises(tqdit.InputError, match="have 8 channels in 'encoder_hidden_states', the model takes 6"):
        tqdit.sample(text_pipeline, num=1, conditions=wide)
    with pytest.raises(tqdit.InputError, match=r"unknown class '3'.*a number from 0 to 2"):
        tqdit.sample(text_pipeline, [3], num=1, conditions=prompts)
    with pytest.raises(tqdit.InputError, match="label 3 is none of the 3 conditions"):
        tqdit.CalibrationSet(torch.zeros(1, 1, 4, 4), torch.tensor([5]), torch.tensor([3]), conditions=prompts)


@pytest.mark.parametrize("saved", ["by tqdit", "by diffusers"])
def test_a_model_card_draws_under_prompts(text_model, scheduler_config, prompts_file, recipe, tmp_path, saved) -> None:
    out = tmp_path / "out"
    model = tqdit.quantize(text_model, recipe, scheduler=scheduler_config, conditions=prompts_file)
    if saved == "by tqdit":
        tqdit.save(model, out, scheduler=scheduler_config)
    else:
        model.save_pretrained(out)
        (out / "scheduler").mkdir()
        (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config))
        (out / "tqdit.json").unlink()
    block = (out / "README.md").read_text().split("```python\n")[2].partition("```")[0].partition("tqdit.save_grid")[0]
    block = block.replace("FOLDER", str(out)).replace("prompts.safetensors", str(prompts_file))
    names: dict = {}
    exec(block.replace("num=16", "num=1, sampling=tqdit.Sampling(steps=2)"), names)
    assert names["images"].shape == (1, 1, 4, 4)


def test_a_finished_artifact_of_other_prompts_is_not_this_run(text_pipeline, prompts, recipe, tmp_path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    tqdit.quantize(text_pipeline, out, recipe, conditions=prompts)
    work.mkdir()  # as of a run that was killed before its work was discarded
    with pytest.warns(RepairWarning, match="was finished by a run that was interrupted"):
        tqdit.quantize(text_pipeline, out, recipe, conditions=prompts, resumable=True)
    work.mkdir(exist_ok=True)
    other = tqdit.Prompts.checked(embeddings(seed=1))
    with pytest.raises(tqdit.InputError, match="exists; choose another folder"):
        tqdit.quantize(text_pipeline, out, recipe, conditions=other, resumable=True)


def test_conditions_by_the_path_of_their_file(
    text_pipeline, text_model, scheduler_config, prompts_file, prompts, tmp_path
) -> None:
    sampling = tqdit.Sampling(steps=2)
    expected = tqdit.sample(text_pipeline, [1], 1, sampling, conditions=prompts)
    assert torch.equal(tqdit.sample(text_pipeline, [1], 1, sampling, conditions=str(prompts_file)), expected)
    recipe = Recipe(groups=2, samples=2, steps=8, rounds=0)
    states = tqdit.calibration_states(text_model, recipe, scheduler=scheduler_config, conditions=prompts_file)
    assert isinstance(states.conditions, tqdit.Prompts)
    given = states.x, states.t, states.labels
    mine = tqdit.CalibrationSet(*given, conditions=prompts_file)
    assert states_sha256(mine) == states_sha256(tqdit.CalibrationSet(*given, conditions=prompts))
    tqdit.quantize(text_pipeline, tmp_path / "out", recipe, conditions=prompts_file)
    compared = tqdit.compare(text_pipeline, tmp_path / "out", 1, sampling, 1, conditions=prompts_file, cost=False)
    assert torch.isfinite(compared.float_model.images).all()


@pytest.mark.parametrize("wrong", [["a cat"], {"prompt_embeds": 1}, 3, tqdit.Prompts, object()])
def test_conditions_that_are_none(text_pipeline, text_model, scheduler_config, tmp_path, wrong: object) -> None:
    states = torch.zeros(1, 1, 4, 4), torch.tensor([5]), torch.tensor([0])
    for call in (
        lambda: tqdit.sample(text_pipeline, num=1, conditions=wrong),
        lambda: tqdit.compare(text_pipeline, [], conditions=wrong),
        lambda: tqdit.quantize(text_pipeline, tmp_path / "out", conditions=wrong),
        lambda: tqdit.quantize(text_model, scheduler=scheduler_config, conditions=wrong),
        lambda: tqdit.calibration_states(text_model, scheduler=scheduler_config, conditions=wrong),
        lambda: tqdit.CalibrationSet(*states, conditions=wrong),
    ):
        with pytest.raises(tqdit.InputError, match=r"^conditions are Prompts, the path of their file, ClassLabels or"):
            call()


def test_every_command(text_pipeline, prompts_file, pipeline, tmp_path, monkeypatch, capsys) -> None:
    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    out, given = tmp_path / "w8a8", ("--prompts", prompts_file)
    assert run("quantize", text_pipeline, "-o", out, *given, *FAST)[0] == 0
    code, text, _ = run("sample", out, "-o", tmp_path / "grid.png", *given, "--classes", "2,0", "-n", 2, "--steps", 2)
    assert code == 0
    assert "ddim 2 steps" in text
    assert run("compare", text_pipeline, out, *given, "-n", 1, "--samples", 1, "--steps", 2, "--no-cost")[0] == 0
    for command in (
        ("sample", out, "-o", tmp_path / "other.png"),
        ("quantize", text_pipeline, "-o", tmp_path / "other", *FAST),
        ("compare", text_pipeline, out),
        ("sample", pipeline, "-o", tmp_path / "other.png", *given),
        ("sample", out, "-o", tmp_path / "other.png", "--prompts", tmp_path / "missing.safetensors"),
    ):
        code, _, error = run(*command)
        assert code == 2
        assert "prompts" in error or "missing.safetensors" in error
        assert len([line for line in error.splitlines() if line.startswith("tqdit:")]) == 1
        assert ("(--prompts FILE on the command line)" in error) is ("--prompts" not in command)


# Flow matching and visited time groups -------------------------------------------------------------------------------


def test_the_paper_on_a_flow_matching_model(tiny_dit, tiny_recipe, tmp_path) -> None:
    flow = tiny_dit(out_channels=1)
    paper = tiny_recipe("paper", groups=2, samples=2, steps=8, rounds=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tqdit.quantize(flow, paper, scheduler=scheduler, out=tmp_path / "out")
    assert tqdit.load(tmp_path / "out").solution.time_groups == TimeGroups.uniform(0.0, 1000.0, 2, closed=True)
    assert tqdit.inspect(tmp_path / "out")["timesteps"] == "[0, 1000]"


def test_states_of_a_flow_matching_model_of_ones_own(tiny_dit, tiny_recipe) -> None:
    flow, recipe = tiny_dit(out_channels=1), tiny_recipe("plus", groups=2, samples=2, steps=8)
    states = tqdit.calibration_states(flow, recipe, scheduler=FLOW)
    mine = tqdit.CalibrationSet(states.x, states.t, states.labels, scheduler=FLOW, groups=2)
    assert torch.equal(mine.step_weight, states.step_weight)
    assert torch.equal(mine.group, states.group)
    assert mine.time_groups == states.time_groups
    shifted = {**FLOW, "use_dynamic_shifting": True}
    with pytest.raises(tqdit.InputError, match="use_dynamic_shifting needs the model"):
        tqdit.CalibrationSet(states.x, states.t, states.labels, scheduler=shifted)
    moved = tqdit.CalibrationSet(states.x, states.t, states.labels, scheduler=shifted, model=flow)
    assert torch.isfinite(moved.step_weight).all()


def test_visited_time_groups(model, tiny_recipe, scheduler_config) -> None:
    """Three steps make three groups of the four that are asked for, and the parameters have as many."""
    recipe = tiny_recipe("plus", groups=4, samples=2, steps=3, rounds=0, time_edges="visited")
    solution = tqdit.quantize(model, recipe, scheduler=scheduler_config).solution
    assert solution.time_groups.num_groups == 3
    assert {spec.groups for spec in solution.sites} == {1, 3}
    with pytest.raises(tqdit.InputError, match="3 steps visit no timestep of time group"):
        tqdit.quantize(model, recipe.model_copy(update={"time_edges": "uniform"}), scheduler=scheduler_config)
    states = tqdit.calibration_states(model, recipe, scheduler=scheduler_config)
    mine = tqdit.CalibrationSet(
        states.x, states.t, states.labels, scheduler=scheduler_config, groups=4, time_edges="visited"
    )
    assert mine.time_groups == states.time_groups
    assert len(tqdit.calibrate(model, mine, recipe).t) == len(mine)


def test_a_plan_has_the_groups_that_were_made() -> None:
    from tqdit.architectures.registry import graph
    from tqdit.architectures.shapes import shape_config

    structure = graph(shape_config("DiT-S/8"))
    assert {site.spec.groups for site in plan(structure, Recipe(), 7).values()} == {1, 7}
    assert {site.spec.groups for site in plan(structure, Recipe()).values()} == {1, 10}


# Samplers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("auto", "ddpm", True),
        ("flow", "auto", True),
        ("ddim", "ddim", True),
        ("auto", "ddim", False),
        ("ddim", "ddpm", False),
        ("ddpm", "flow", False),
    ],
)
def test_records_serve_recipes_of_the_same_sampler(first: str, second: str, same: bool) -> None:
    assert Recipe(sampler=first).records_match(Recipe("plus", "w4a8", sampler=second)) is same


def test_auto_is_ddpm_in_calibration(model, recipe, scheduler_config) -> None:
    named = Recipe(**{**recipe.model_dump(), "sampler": "ddpm"})
    first, second = (tqdit.quantize(model, r, scheduler=scheduler_config).solution for r in (recipe, named))
    assert recipe.sampler == "auto"
    assert equal(first, second)
