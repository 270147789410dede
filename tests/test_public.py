"""The public surface of the package is what it says it is, for models in memory as for paths."""

import copy
import inspect
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import tqdit
from tqdit import stages, workflow
from tqdit.errors import InputError
from tqdit.quality.comparison import compare_samples
from tqdit.quality.traced_artifacts import compare_folders
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Sampling
from tqdit.timegroups import TimeGroups

VERBS = {
    "calibrate",
    "calibration_states",
    "compare",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "sample",
    "save",
    "solve",
}
NOUNS = {"CalibrationSet", "Comparison", "Recipe", "Records", "Sampling", "Solution", "Summary", "Target"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return tiny_recipe("plus", groups=2, samples=2, steps=8, rounds=1)


@pytest.fixture(scope="module")
def states(model, recipe, scheduler_config) -> tqdit.CalibrationSet:
    return tqdit.calibration_states(model, recipe, scheduler=scheduler_config)


@pytest.fixture(scope="module")
def solution(model, states, recipe) -> tqdit.Solution:
    return tqdit.solve(model, tqdit.calibrate(model, states, recipe), recipe)


@pytest.fixture(scope="module")
def by_path(pipeline, recipe, tmp_path_factory) -> Path:
    """The artifact of the same model and recipe that `quantize` writes by itself."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    tqdit.quantize(pipeline, out, recipe)
    return out


class Pipeline:
    """What the objects of diffusers' pipelines have in common."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.config = transformer, {}


def same_codes(a: tqdit.Solution, b: tqdit.Solution) -> bool:
    same = [torch.equal(codes, b.codes[name]) for name, codes in a.codes.items()]
    same += [torch.equal(params.scale, b.params[name].scale) for name, params in a.params.items()]
    return all(same) and set(a.codes) == set(b.codes)


def test_dir_lists_the_public_names_alone() -> None:
    assert dir(tqdit) == sorted(tqdit.__all__)
    assert set(dir(tqdit)) >= VERBS | NOUNS
    assert all(hasattr(tqdit, name) for name in dir(tqdit))
    assert all(getattr(tqdit, name).__doc__ for name in dir(tqdit))


def test_importing_is_quick() -> None:
    code = "import sys, tqdit; tqdit.InputError; print({'torch', 'diffusers', 'pydantic'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Models in memory ----------------------------------------------------------------------------------------------------


def test_a_transformer_in_memory_gives_the_codes_of_its_folder(model, recipe, scheduler_config, by_path, model_inputs):
    before = copy.deepcopy(model.state_dict())
    integer = tqdit.quantize(model, recipe, scheduler=DDIMScheduler.from_config(scheduler_config))
    loaded = tqdit.load(by_path)
    assert same_codes(loaded.solution, integer.solution)
    assert torch.equal(integer(**model_inputs).sample, loaded(**model_inputs).sample)
    assert type(model).__name__ == "DiTTransformer2DModel"
    assert not hasattr(model, "solution")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_use_is_left_as_it_is(tiny_dit, recipe, scheduler_config, solution) -> None:
    """In training mode, with gradients and in another dtype, whatever calibrating it needs."""
    busy = tiny_dit().train().requires_grad_(True)
    assert same_codes(tqdit.quantize(busy, recipe, scheduler=scheduler_config).solution, solution)
    assert busy.training
    assert all(p.requires_grad and p.grad is None for p in busy.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in busy.modules())
    half = tiny_dit().bfloat16()
    tqdit.quantize(half, recipe, scheduler=scheduler_config)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_stages_one_by_one_are_quantize(solution, states, by_path, recipe) -> None:
    made = tqdit.load(by_path).solution
    assert same_codes(made, solution)
    assert made.provenance == replace(solution.provenance, source="tiny-dit")
    assert (states.time_groups, len(states)) == (TimeGroups.uniform(0, 1000, 2), 4)
    assert tqdit.convert(solution, backend="reference").quantization_backend == "reference"
    assert tqdit.convert(solution, dtype=torch.bfloat16).stream_dtype is torch.bfloat16


def test_records_serve_several_recipes(model, states, recipe) -> None:
    records = tqdit.calibrate(model, states, recipe)
    six = tqdit.solve(model, records, tqdit.Recipe(**{**recipe.model_dump(), "weight_bits": 6}))
    assert {params.spec.bits for name, params in six.params.items() if name.endswith("to_q.weight")} == {6}
    with pytest.raises(InputError, match="calibration settings are not those"):
        tqdit.solve(model, records, tqdit.Recipe(**{**recipe.model_dump(), "seed": 1}))


@pytest.mark.parametrize("form", ["solution", "model"])
def test_an_artifact_of_what_is_in_memory(solution, scheduler_config, tmp_path, form: str) -> None:
    given = solution if form == "solution" else tqdit.convert(solution)
    labels = {0: "zero", 7: "seven"}
    tqdit.save(given, tmp_path / "out", scheduler=DDIMScheduler.from_config(scheduler_config), labels=labels)
    assert same_codes(tqdit.load(tmp_path / "out").solution, solution)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler is there
        images = tqdit.sample(tmp_path / "out", ["seven"], 1, Sampling("ddim", 2))
    assert images.shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="exists"):
        tqdit.save(given, tmp_path / "out")
    tqdit.save(given, tmp_path / "out", overwrite=True)
    with pytest.warns(tqdit.AssumptionWarning, match="has no scheduler"):
        tqdit.load(tmp_path / "out")


def test_an_artifact_has_the_timesteps_of_its_scheduler(tiny_dit, recipe, solution, tmp_path) -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(InputError, match=r"in \[0, 1000\), the FlowMatchEulerDiscreteScheduler of .* has \[0, 1000\]"):
        tqdit.save(solution, tmp_path / "out", scheduler=flow)
    with pytest.raises(InputError, match=r"in \[0, 1000\), the DDIMScheduler of .* has \[0, 500\)"):
        tqdit.save(tqdit.convert(solution), tmp_path / "out", scheduler=DDIMScheduler(500))
    model = tqdit.quantize(tiny_dit(out_channels=1), recipe, scheduler=flow)
    with pytest.raises(InputError, match=r"has timesteps in \[0, 1000\]; give its scheduler, since \[0, 1000\) would"):
        tqdit.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tqdit.save(model, tmp_path / "out", scheduler=flow)
    assert tqdit.sample(tmp_path / "out", [0], 1, Sampling(steps=2)).shape == (1, 1, 8, 8)
    model.save_pretrained(tmp_path / "bare")  # diffusers saves a model without a scheduler
    with (
        pytest.warns(tqdit.AssumptionWarning, match="has no scheduler"),
        pytest.raises(InputError, match=r"^'bare' has timesteps in \[0, 1000\], the DDIMScheduler"),
    ):
        tqdit.sample(tmp_path / "bare", [0], 1, Sampling(steps=2))


def test_quantize_writes_an_artifact_too(model, recipe, scheduler_config, solution, tmp_path) -> None:
    integer = tqdit.quantize(
        model, recipe, scheduler=scheduler_config, out=tmp_path / "out", labels={3: "three"}, backend="reference"
    )
    assert integer.quantization_backend == "reference"
    assert same_codes(tqdit.load(tmp_path / "out").solution, solution)
    with pytest.raises(InputError, match="exists"):
        tqdit.quantize(model, recipe, scheduler=scheduler_config, out=tmp_path / "out")


# States of a user's own ----------------------------------------------------------------------------------------------


def test_states_of_ones_own(model, states, recipe, scheduler_config) -> None:
    """Their groups and step weights are made; the order does not matter."""
    recipe = recipe.model_copy(update={"hessian": "published"})  # no image was drawn to weigh their errors by
    solution = tqdit.solve(model, tqdit.calibrate(model, states, recipe), recipe)
    shuffled = torch.tensor([2, 0, 3, 1])
    mine = tqdit.CalibrationSet(
        states.x[shuffled], states.t[shuffled], states.labels[shuffled], scheduler=scheduler_config, groups=2
    )
    assert mine.group.tolist() == states.group.tolist() == [0, 0, 1, 1]
    assert torch.equal(mine.step_weight.sort().values, states.step_weight.sort().values)
    plain = tqdit.CalibrationSet(states.x, states.t, states.labels)
    assert plain.time_groups == TimeGroups.uniform(0, 1000, 10)
    assert plain.step_weight.tolist() == [1.0] * 4
    again = tqdit.CalibrationSet(states.x, states.t, states.labels, scheduler=scheduler_config, groups=2)
    assert same_codes(tqdit.solve(model, tqdit.calibrate(model, again, recipe), recipe), solution)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 1, 8)}, r"x must have the shape \(S, C, H, W\), got \(4, 1, 8\)"),
        ({"x": torch.zeros(0, 1, 8, 8)}, r"got \(0, 1, 8, 8\)"),
        ({"labels": torch.zeros(3)}, r"labels must have the shape \(4,\), got \(3,\)"),
        ({"t": torch.tensor([0, 1, 2, 1000])}, r"timestep 1000 is outside \[0, 1000\)"),
        ({"t": [0, 1, 2, 3]}, "t must be a tensor, got list"),
        ({"labels": torch.zeros(4)}, "labels must be integers, got torch.float32"),
        ({"time_edges": "visted"}, "time_edges must be one of uniform, visited, got 'visted'"),
        (
            {"t": torch.tensor([0, 200, 400, 900]), "group": torch.tensor([0, 2, 4, 8])},
            "state 3 is in time group 8, its timestep 900 is in group 9",
        ),
        ({"groups": 0}, "groups must be between 1 and 1000"),
        ({"scheduler": "ddim"}, "a scheduler is one of diffusers or its config, got str"),
    ],
)
def test_states_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(4, 1, 8, 8), "t": torch.arange(4), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(InputError, match=message):
        tqdit.CalibrationSet(**given | change)


def test_states_of_other_dtypes_are_copied(states, scheduler_config) -> None:
    given = states.x.double(), states.t.int(), states.labels.int()
    found = tqdit.CalibrationSet(*given, scheduler=scheduler_config, groups=2)
    assert torch.equal(found.x, states.x)
    assert (found.x.dtype, found.labels.dtype) == (torch.float32, torch.int64)


def test_states_of_a_scheduler_itself() -> None:
    """Its class decides the range of the timesteps, and a `config` of diffusers may lack the class."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    given = torch.zeros(2, 1, 8, 8), torch.tensor([0.5, 500.0]), torch.zeros(2, dtype=torch.int64)
    found = tqdit.CalibrationSet(*given, scheduler=scheduler, groups=2)
    assert found.time_groups == TimeGroups.uniform(0, 500, 2, closed=True)
    assert found.group.tolist() == [0, 1]


def test_states_that_do_not_fit_the_recipe(model, states, tiny_recipe) -> None:
    for settings, message in (
        ({"groups": 3, "samples": 2}, "the states have 2 time groups, the recipe 3"),
        ({"groups": 2, "samples": 3}, "time group 0 of 2 has 2 states, the recipe's 'samples' asks for 3 in each"),
    ):
        with pytest.raises(InputError, match=message):
            tqdit.calibrate(model, states, tiny_recipe(**settings))


# What is wrong -------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_quantized(model, recipe, scheduler_config, solution) -> None:
    class Other(nn.Module):
        config = model.config

    for wrong, message in (
        (nn.Linear(2, 2), "a Linear has no diffusers config"),
        (Other(), "Other"),
        (tqdit.convert(solution), "already quantized"),
    ):
        with pytest.raises(InputError, match=message):
            tqdit.calibration_states(wrong, recipe, scheduler=scheduler_config)
    with pytest.raises(InputError, match="scheduler class 'Euler' is not supported"):
        tqdit.quantize(model, recipe, scheduler={"_class_name": "Euler"})
    with pytest.raises(InputError, match="a scheduler is one of diffusers or its config, got str"):
        tqdit.calibration_states(model, recipe, scheduler="ddim")
    with pytest.raises(InputError, match="save takes a solution or an integer model, got a DiTTransformer2DModel"):
        tqdit.save(model, "out")


def test_arguments_of_another_kind(model, recipe, scheduler_config, states, tmp_path) -> None:
    wide = tqdit.CalibrationSet(states.x.expand(-1, 3, -1, -1), states.t, states.labels, groups=2)
    for call, message in (
        (lambda: tqdit.quantize(model, "w8a8", scheduler=scheduler_config), r"a recipe is a tqdit\.Recipe.*, got str"),
        (lambda: tqdit.quantize("fashion-dit", tmp_path / "out", "plus"), r"a recipe is a tqdit\.Recipe.*, got str"),
        (lambda: tqdit.quantize("fashion-dit", recipe), "needs the folder to write before the recipe"),
        (lambda: tqdit.quantize("fashion-dit", recipe=recipe), "needs the folder to write before the recipe"),
        (lambda: tqdit.quantize(model, recipe), r"needs scheduler=\.\.\., such as pipe\.scheduler"),
        (lambda: tqdit.quantize(model, tmp_path / "out", recipe, scheduler=scheduler_config), "the rest by name"),
        (lambda: tqdit.quantize(nn.Linear(2, 2), recipe), "a Linear has no diffusers config; give a transformer"),
        (lambda: tqdit.quantize(Pipeline(model), recipe), r"got Pipeline; give pipe\.transformer"),
        (
            lambda: tqdit.calibration_states(Pipeline(model), recipe, scheduler=scheduler_config),
            r"a Pipeline is no model; give pipe\.transformer",
        ),
        (lambda: tqdit.calibrate(states, model, recipe), "states are a CalibrationSet, got DiTTransformer2DModel"),
        (lambda: tqdit.calibrate("fashion-dit", states, recipe), "a str is no model; give a transformer of diffusers"),
        (lambda: tqdit.sample(model), "a model is given by its path or name, got DiTTransformer2DModel"),
        (lambda: tqdit.compare(model, []), "a model is given by its path or name, got DiTTransformer2DModel"),
        (lambda: tqdit.compare("fashion-dit", "no-such-artifact"), "unknown model 'no-such-artifact'"),
        (lambda: tqdit.quantize(object(), recipe), "a path, a name or a diffusers transformer, got object"),
        (
            lambda: tqdit.quantize("fashion-dit", tmp_path / "out", conditions=["a cat"]),
            "conditions are Prompts, the path of their file.*got list",
        ),
        (lambda: tqdit.calibrate(model, [states], recipe), "states are a CalibrationSet, got list"),
        (lambda: tqdit.calibrate(model, wide, recipe), "the states have 3 channels, the model takes 1"),
        (lambda: tqdit.solve(model, states, recipe), "records are what calibrate returns, got CalibrationSet"),
        (lambda: tqdit.convert(model), "a solution is what solve returns, got DiTTransformer2DModel"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert not (tmp_path / "out").exists()


def test_reports_backends_classes_and_places_of_another_kind(model, recipe, scheduler_config, tmp_path) -> None:
    out = tmp_path / "out"
    for report in (None, 5, "bar"):
        for verb in (
            lambda report: tqdit.quantize("fashion-dit", out, recipe, report=report),
            lambda report: tqdit.quantize(model, recipe, scheduler=scheduler_config, report=report),
            lambda report: tqdit.quantize(model, recipe, calls=[], report=report),
            lambda report: tqdit.quantize("fashion-dit", out, recipe, calls=[], report=report),
            lambda report: tqdit.compare("fashion-dit", out, report=report),
            lambda report: tqdit.sample("fashion-dit", report=report),
            lambda report: tqdit.evaluate("fashion-dit", "fashion-test", out, report=report),
            lambda report: tqdit.workflow.prepare("fashion-dit", recipe, report),
        ):
            with pytest.raises(InputError, match=f"^report must be a function of a .* fraction, got {report!r}$"):
                verb(report)
    for call, message in (
        (lambda: tqdit.load("fashion-dit", backend=["cpu"]), r"unknown backend '\['cpu'\]'; known: auto, "),
        (lambda: tqdit.sample("fashion-dit", 1.5), "classes must be a list .* got a value of the type float"),
        (lambda: tqdit.sample("fashion-dit", torch.zeros(2)), r"unknown class 'tensor\(0\.\)'"),
        (lambda: tqdit.quantize(model, recipe, scheduler=scheduler_config, out=5), "out must be a path, got 5"),
        (lambda: tqdit.quantize(model, recipe, calls=[], out=["a"]), r"out must be a path, got \['a'\]"),
        (lambda: tqdit.Sampling(steps="5"), "steps must be a whole number of at least 1, got '5'"),
        (lambda: tqdit.Sampling(steps=2.5), r"steps must be a whole number of at least 1, got 2\.5"),
        (lambda: tqdit.Sampling(guidance=None), "guidance must be a finite number from 0, got None"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            call()
    assert not out.exists()


def test_records_of_another_model(model, tiny_dit, states, recipe) -> None:
    records, other = tqdit.calibrate(model, states, recipe), copy.deepcopy(model)
    with torch.no_grad():
        other.proj_out_2.bias += 1
    with pytest.raises(InputError, match="the records are of other weights than the transformer's"):
        tqdit.solve(other, records, recipe)
    with pytest.raises(InputError, match="records are what calibrate returns, got DiTTransformer2DModel"):
        tqdit.solve(records, model, recipe)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["shirt"], "labels are class names by number, .* got list"),
        ({"0": "shirt"}, "labels have the key '0', keys are class numbers"),
        ({-1: "shirt"}, "labels have the key -1, keys are class numbers"),
        ({0: 3}, "labels has a int for class 0, names are strings"),
        ({10: "coat"}, "labels names class 10, the model has classes 0 to 9"),
    ],
)
def test_labels_are_checked_before_any_work(model, recipe, scheduler_config, solution, tmp_path, labels, message):
    out, options = tmp_path / "out", {"scheduler": scheduler_config, "labels": labels}
    with pytest.raises(InputError, match=message):
        tqdit.save(solution, out, **options)
    started: list[str] = []
    with pytest.raises(InputError, match=message):
        tqdit.quantize(model, recipe, out=out, report=lambda stage, _: started.append(stage), **options)
    assert not started
    assert not out.exists()


def test_a_tensor_that_is_not_finite_or_not_here(tiny_dit, recipe, scheduler_config) -> None:
    broken = tiny_dit()
    broken.proj_out_1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"tensor 'proj_out_1\.weight' is nan"):
        tqdit.calibration_states(broken, recipe, scheduler=scheduler_config)
    with pytest.raises(InputError, match=r"is offloaded; remove accelerate's hooks"):
        tqdit.calibration_states(tiny_dit().to("meta"), recipe, scheduler=scheduler_config)


# Target, and options that were positional ----------------------------------------------------------------------------


def test_a_target_is_checked_when_it_is_made() -> None:
    target = Target("cpu", "cpu", "bfloat16")
    assert target == Target("cpu", torch.device("cpu"), torch.bfloat16) != Target("cpu", "cpu")
    assert hash(target) == hash(Target("cpu", torch.device("cpu"), torch.bfloat16))
    assert (target.device, target.dtype, target.dtype_name) == (torch.device("cpu"), torch.bfloat16, "bfloat16")
    assert Target().kernels.NAME == "cpu"
    with pytest.raises(AttributeError):
        target.backend = "auto"
    for wrong, message in (
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
        ({"device": "toaster"}, "device 'toaster' is not available here"),
        ({"dtype": "float64"}, "dtype 'float64' is not one of float32, float16, bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            Target(**wrong)


def test_options_are_still_taken_by_position(by_path) -> None:
    with pytest.warns(DeprecationWarning, match=r"load: give backend=\.\.\., device=\.\.\. by name") as caught:
        assert tqdit.load(by_path, "reference", "cpu").quantization_backend == "reference"
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"^compare: give report=") as late, pytest.raises(InputError):
        tqdit.compare("fashion-dit", "no-such-artifact", 1, Sampling(), 1, 0, stages.silent)
    assert late[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"inspect: give backend"):
        assert tqdit.inspect(by_path, "reference")["backend"] == "reference"
    with (
        pytest.warns(DeprecationWarning, match=r"^quantize: give overwrite=\.\.\.") as caught,
        pytest.raises(InputError),
    ):
        tqdit.quantize("no-such-model", by_path.with_name("new"), tqdit.Recipe(), True)
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="positional"):
        tqdit.load(by_path, "auto", "cpu", "float32", "more")
    with pytest.warns(DeprecationWarning, match="by name"), pytest.raises(TypeError, match="multiple values"):
        tqdit.load(by_path, "reference", backend="cpu")


def test_a_flag_is_true_or_false(model, recipe, scheduler_config, solution, tmp_path) -> None:
    """A device at the former place of `overwrite` would else be taken for yes."""
    message = "^overwrite must be True or False, got 'cpu'$"
    with pytest.warns(DeprecationWarning, match="^quantize: give overwrite"), pytest.raises(InputError, match=message):
        tqdit.quantize("fashion-dit", tmp_path / "out", recipe, "cpu")
    for call in (
        lambda: tqdit.quantize("fashion-dit", tmp_path / "out", recipe, overwrite="cpu"),
        lambda: tqdit.quantize(model, recipe, scheduler=scheduler_config, out=tmp_path / "out", overwrite="cpu"),
        lambda: tqdit.save(solution, tmp_path / "out", overwrite="cpu"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match=r"^resumable must be True or False, got 1$"):
        tqdit.quantize("fashion-dit", tmp_path / "out", recipe, resumable=1)
    assert not (tmp_path / "out").exists()


def test_options_are_named_in_the_signature() -> None:
    functions = (workflow.load, workflow.inspect, workflow.sample, workflow.quantize_source, workflow.quantize_module)
    steps = (stages.calibrate, stages.solve, stages.convert, stages.save)
    for function in (*functions, *steps, compare_samples, compare_folders):
        parameters = inspect.signature(function).parameters.values()
        options = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert {"backend", "device", "dtype", "report", "overwrite"} & {p.name for p in parameters} <= options
