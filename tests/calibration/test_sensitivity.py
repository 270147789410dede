"""The sensitivity of the image against exact Jacobians and finite differences, and its way into the records."""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import tqdit
from tqdit.calibration import sensitivity, trajectories
from tqdit.calibration.adjoint import moves
from tqdit.calibration.recorder import record
from tqdit.calibration.sensitivity import LEAST, Sensitivity, image_sampling, measure
from tqdit.calibration.store import WorkFolder
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.sampling.guidance import ClassLabels, Sample, Sampling, arguments, predict
from tqdit.sampling.schedules import schedule
from tqdit.sampling.trajectory import noise_generators
from tqdit.system.world import World
from tqdit.timegroups import TimeGroups

DIFFUSION = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
PROCESSES = {
    "ddim": (DIFFUSION, Sampling("ddim", 4, 1.5), 1),
    "ddim, learned variance": (DIFFUSION, Sampling("ddim", 3, 1.5), 2),
    "ddim, no guidance": (DIFFUSION, Sampling("ddim", 3, 1.0), 1),
    "ddim, v": ({**DIFFUSION, "prediction_type": "v_prediction"}, Sampling("ddim", 3, 2.0), 1),
    "ddpm": (DIFFUSION, Sampling("ddpm", 4, 1.5), 1),
    "ddpm, learned variance": (DIFFUSION, Sampling("ddpm", 4, 1.5), 2),
    "flow": (FLOW, Sampling("flow", 4, 1.5), 1),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
CLASSES = ClassLabels(3)


class Tiny(nn.Module):
    """A model of 2 x 2 pixels that mixes them, without or with a hidden layer, by class and timestep."""

    def __init__(self, channels: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.config = {"in_channels": 1, "out_channels": channels, "sample_size": 2, "num_embeds_ada_norm": 3}
        generator = torch.Generator().manual_seed(5)
        drawn = [torch.randn(size, generator=generator) / 2 for size in ((8, 4), (4, 8), (4 * channels, 8))]
        self.first, self.classes, self.last = (nn.Parameter(x, requires_grad=False) for x in drawn)
        self.linear = linear

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        hidden = x.flatten(1) @ self.first.T * (1 - timestep[:, None] / 2000) + self.classes[class_labels]
        hidden = hidden if self.linear else hidden.tanh()
        return ((hidden @ self.last.T).reshape(len(x), -1, 2, 2),)


def sample_of(process: Any) -> Sample:
    return Sample((1, 2, 2), process[2], 1)


def images(model: nn.Module, process: Any, seeds: Sequence[int], errors: torch.Tensor) -> torch.Tensor:
    """x_0 of one run for each seed, with errors (B, steps, 1, 2, 2) of the guided output: a plain loop."""
    scheduler, sampling, channels = process
    generators = noise_generators(0, seeds)
    _, x = (torch.cat([torch.randn(1, 1, 2, 2, generator=g) for g in generators]) for _ in range(2))
    steps = schedule(scheduler, sampling, sample_of(process))
    inputs = arguments(CLASSES, torch.full((len(seeds),), 1), sampling.guidance)
    for i, t in enumerate(steps.timesteps.tolist()):
        output = predict(model, x, torch.full((len(x),), t), *inputs, sampling.guidance)
        wrong = nn.functional.pad(errors[:, i], (0, 0, 0, 0, 0, channels - 1))
        x = steps.step(output + wrong, i, x, generators)
    return x


def measured(model: nn.Module, process: Any, seeds: Sequence[int]) -> torch.Tensor:
    """What is measured of the same runs: (B, steps)."""
    scheduler, sampling, _ = process
    labels = torch.full((len(seeds),), 1)
    given = (model, scheduler, sampling, labels, noise_generators(0, seeds), CLASSES, sample_of(process))
    image, output = moves(*given)
    assert (output == 1).all()
    return image


def jacobian(model: nn.Module, process: Any, seed: int) -> torch.Tensor:
    """The Jacobian of x_0 by the error of each step: (4, steps, 4)."""
    no_error = torch.zeros(1, process[1].steps, 1, 2, 2)
    rows = torch.autograd.functional.jacobian(lambda errors: images(model, process, [seed], errors).flatten(), no_error)
    return rows.reshape(4, -1, 4)


@processes
def test_gradients_are_those_of_the_whole_run(process: Any) -> None:
    model, seed = Tiny(process[2]), 11
    probe = torch.randn(1, 1, 2, 2, generator=noise_generators(0, [seed])[0]).flatten()
    expected = torch.einsum("i,isj->sj", probe, jacobian(model, process, seed)).square().mean(1)
    assert torch.allclose(measured(model, process, [seed])[0], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddim, v", "ddpm", "flow"])
def test_mean_over_probes_is_the_squared_jacobian(name: str) -> None:
    """The steps of a linear model have the same Jacobian at every state."""
    process = PROCESSES[name]
    model = Tiny(process[2], linear=True)
    found = measured(model, process, range(2000)).mean(0)
    assert torch.allclose(found, jacobian(model, process, 0).square().sum((0, 2)) / 4, rtol=0.1)


@processes
def test_finite_differences_agree(process: Any) -> None:
    """A small random error of one step's output, the sampling continued with the same noise."""
    model, seeds, count = Tiny(process[2]), range(2000), process[1].steps
    errors = torch.zeros(len(seeds), count, 1, 2, 2)
    exact, moves = images(model, process, seeds, errors), []
    for i in range(count):
        wrong = errors.clone()
        wrong[:, i] = torch.randn(len(seeds), 1, 2, 2) * 1e-2
        moved = (images(model, process, seeds, wrong) - exact).flatten(1).square().sum(1)
        moves.append((moved / wrong.flatten(1).square().sum(1)).mean())
    assert torch.allclose(measured(model, process, seeds).mean(0), torch.stack(moves), rtol=0.15)


@pytest.mark.parametrize("name", ["ddim", "ddpm, learned variance", "ddim, no guidance", "flow"])
def test_noise_in_layers_moves_image_and_output_as_measured(name: str) -> None:
    """Noise at the hidden layer and at the output of one step, the sampling continued without noise."""
    process = PROCESSES[name]
    model, seeds = Layers(process[2]), range(3000)
    scheduler, sampling, _ = process
    given = (torch.full((len(seeds),), 1), noise_generators(0, seeds), CLASSES, sample_of(process))
    image, output = moves(model, scheduler, sampling, *given, layers=[model.first, model.last])
    no_error, found = torch.zeros(len(seeds), sampling.steps, 1, 2, 2), []
    model.outputs.clear()
    exact = images(model, process, seeds, no_error)
    for i in range(sampling.steps):
        model.noisy, model.calls = i, -1
        moved = (images(model, process, seeds, no_error) - exact).square().mean()
        found.append(moved / own_error(model, process, seeds, i))
        model.noisy = None
    assert torch.allclose(image.mean(0) / output.mean(0), torch.stack(found), rtol=0.15)


def own_error(model: nn.Module, process: Any, seeds: Sequence[int], step: int) -> torch.Tensor:
    """The mean square by which noise at one step moves the guided output."""
    clean, noisy = model.outputs[step], model.outputs[-process[1].steps + step]
    halves = [x[:, :1] for x in (noisy - clean).split(len(seeds))]
    guidance = process[1].guidance
    error = halves[0] if len(halves) == 1 else halves[1] + guidance * (halves[0] - halves[1])
    return error.square().mean()


class Layers(nn.Module):
    """A model of two linear layers that adds noise to their outputs at the step `noisy`, and keeps its outputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4 * channels)
        self.classes = nn.Parameter(torch.randn(4, 8))
        self.noisy: int | None = None
        self.calls, self.outputs = -1, list[torch.Tensor]()
        self.requires_grad_(False)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        self.calls += 1
        hidden = self.noise(self.first(x.flatten(1) * (1 - timestep[:, None] / 2000)))
        output = self.noise(self.last((hidden + self.classes[class_labels]).tanh())).reshape(len(x), -1, 2, 2)
        self.outputs.append(output.detach())
        return (output,)

    def noise(self, z: torch.Tensor) -> torch.Tensor:
        if self.noisy is None or self.calls != self.noisy:
            return z
        return z + 1e-2 * z.square().mean(1, keepdim=True).sqrt() * torch.randn_like(z)


# The whole measurement ---------------------------------------------------------------------------------------------


def test_few_runs_are_those_of_the_classes_with_their_own_noise(model, scheduler_config) -> None:
    found = measure(model, scheduler_config, Sampling("ddim", 5, 1.5), samples=3, seed=7)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(7))[:3]
    sampling, layers = Sampling("ddim", 5, 1.5), sensitivity._layers(model)
    assert len(layers) == 2 * 6

    def moved(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        generators = noise_generators(7, range(sensitivity.SENSITIVITY_STREAM, sensitivity.SENSITIVITY_STREAM + 3))
        given = (order, generators, ClassLabels(10), Sample((1, 8, 8), 2, 16))
        return moves(model, scheduler_config, sampling, *given, **options)

    image, output = moved(layers=layers)
    assert torch.equal(found.squared, image.mean(0) / output.mean(0))
    white = measure(model, scheduler_config, sampling, samples=3, seed=7, white=True)
    assert torch.equal(white.squared, moved()[0].mean(0))
    assert found.t.tolist() == [800, 600, 400, 200, 0]
    assert found.squared.dtype is torch.float32


def test_seed_decides_and_batch_changes_rounding_alone(model, scheduler_config, monkeypatch) -> None:
    given = (model, scheduler_config, Sampling("ddim", 6, 1.5))
    first, again, other = (measure(*given, samples=5, seed=seed).squared for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-2)
    monkeypatch.setattr(sensitivity, "BATCH", 2)
    assert torch.allclose(measure(*given, samples=5).squared, first, rtol=1e-4)


def test_a_device_without_memory_for_a_batch_takes_smaller_ones(model, scheduler_config, monkeypatch) -> None:
    given, original, sizes = (model, scheduler_config, Sampling("ddim", 4, 1.5)), moves, []

    def small(*args: Any, **rest: Any) -> Any:
        sizes.append(len(args[3]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return original(*args, **rest)

    whole = measure(*given, samples=4).squared
    monkeypatch.setattr(sensitivity, "moves", small)
    assert torch.allclose(measure(*given, samples=4).squared, whole, rtol=1e-4)
    assert sizes == [4, 2, 2]


class Rank(World):
    """One of two processes; what both have made is in a dictionary instead of on a wire."""

    made: ClassVar[dict[int, list[Any]]] = {}

    def gather_named(self, parts: Any, count: int, reader: Any = None) -> list[Any]:
        self.made[self.rank] = list(parts)
        pairs = itertools.zip_longest(self.made.get(0, []), self.made.get(1, []))
        return [part for pair in pairs for part in pair if part is not None]


def test_ranks_share_the_runs_and_get_the_same_bytes(model, scheduler_config, monkeypatch) -> None:
    given = (model, scheduler_config, Sampling("ddim", 3, 1.5), None, 9)
    alone = measure(*given)
    for rank in (1, 0):
        monkeypatch.setattr(sensitivity.distributed, "current", lambda rank=rank: Rank(rank, 2))
        together = measure(*given)
    assert [len(Rank.made[rank]) for rank in (0, 1)] == [2, 1]
    assert torch.equal(together.squared, alone.squared)


def test_finished_batches_are_not_measured_again(model, scheduler_config, tmp_path, monkeypatch) -> None:
    given = (model, scheduler_config, Sampling("ddim", 3, 1.5), None, 6)
    store = WorkFolder(tmp_path)
    first = measure(*given, store=store)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "sensitivity-000000-000004.safetensors", "sensitivity-000004-000006.safetensors"
    ]  # fmt: skip
    monkeypatch.setattr(sensitivity, "moves", None)
    assert torch.equal(measure(*given, store=store).squared, first.squared)


def test_the_model_is_left_as_it_was_and_another_may_draw(model, scheduler_config) -> None:
    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor, **given: Any) -> tuple[torch.Tensor]:
            assert not torch.is_grad_enabled()
            calls.append(len(x))
            return model(x, **given)

    calls: list[int] = []
    given = (model, scheduler_config, Sampling("ddim", 3, 1.5), None, 2)
    with torch.no_grad():  # as a caller may have it
        found = measure(*given, drawing=Drawing())
    assert calls == [4, 4, 4]
    assert torch.equal(found.squared, measure(*given).squared)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_progress_rises_to_the_end(model, scheduler_config) -> None:
    told: list[float] = []
    measure(model, scheduler_config, Sampling("ddim", 3, 1.5), samples=5, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_sensitivity_that_is_not_finite_names_the_timestep(tiny_dit, scheduler_config) -> None:
    broken = tiny_dit()
    with torch.no_grad():
        broken.proj_out_2.weight.mul_(1e30)
    with pytest.raises(InputError, match=r"sensitivity of the image .* NaN or Inf values at timestep 666"):
        measure(broken, scheduler_config, Sampling("ddim", 3, 1.5), samples=1)


# Weights of states -------------------------------------------------------------------------------------------------

KNOWN = Sensitivity(torch.tensor([800, 600, 200, 0]), torch.tensor([4.0, 1.0, 1e-2, 0.0]))


def test_between_timesteps_the_logarithm_is_linear_outside_it_is_the_nearest() -> None:
    found = KNOWN.by_timestep(torch.tensor([[999, 800, 700], [600, 400, 200]]))
    assert torch.allclose(found, torch.tensor([[4.0, 4.0, 2.0], [1.0, 0.1, 1e-2]]))
    assert found.dtype is torch.float32
    assert KNOWN.by_timestep(torch.tensor([0])).item() == pytest.approx(4 * LEAST)
    assert Sensitivity(torch.tensor([5.0]), torch.tensor([2.0])).by_timestep(torch.arange(3)).tolist() == [2.0] * 3


def test_fractions_of_timesteps_are_looked_up_as_they_are() -> None:
    found = Sensitivity(torch.tensor([1.0, 0.5, 0.25]), torch.tensor([4.0, 1.0, 4.0]))
    assert torch.allclose(found.by_timestep(torch.tensor([0.75, 0.375])), torch.tensor([2.0, 2.0]))


def test_a_weighted_sum_over_states_is_the_sum_over_the_steps() -> None:
    """Groups [0, 250), [250, 500), [500, 750), [750, 1000) have 2, 0, 1 and 1 of the steps."""
    groups = TimeGroups.uniform(0, 1000, 4)
    t = torch.tensor([100, 300, 600, 600, 600, 800])
    weights = KNOWN.weights(t, groups)
    expected = KNOWN.by_timestep(t) * torch.tensor([2, 1, 1 / 3, 1 / 3, 1 / 3, 1])
    assert torch.allclose(weights, expected / expected.max())
    assert weights.max() == 1.0
    assert torch.allclose(KNOWN.contributions(t, groups), expected.double())
    nothing = Sensitivity(KNOWN.t, torch.zeros(4)).weights(t, groups)
    assert torch.allclose(nothing, torch.tensor([1, 1 / 2, 1 / 6, 1 / 6, 1 / 6, 1 / 2]))


@pytest.mark.parametrize(("config", "total"), [(DIFFUSION, 50), ({**DIFFUSION, "num_train_timesteps": 20}, 20)])
def test_images_are_drawn_in_the_default_number_of_steps(config: Any, total: int) -> None:
    assert image_sampling(config, 2.5) == Sampling("ddim", total, 2.5)
    assert image_sampling(FLOW, 1.0) == Sampling("flow", 50, 1.0)


# The way into the records ------------------------------------------------------------------------------------------


@pytest.fixture
def image_recipe(tiny_recipe) -> tqdit.Recipe:
    """A recipe that weighs errors by the image."""
    return tiny_recipe(trajectories=2).model_copy(update={"hessian": "image"})


@pytest.mark.usefixtures("states_in_float32")
def test_collected_states_have_the_measured_weight(model, scheduler_config, image_recipe) -> None:
    told: list[float] = []
    data = collect(model, scheduler_config, image_recipe, told.append)
    sampling = image_sampling(scheduler_config, image_recipe.guidance)
    expected = measure(model, scheduler_config, sampling, seed=image_recipe.seed).weights(data.t, data.time_groups)
    assert torch.equal(data.image_weight, expected)
    assert not torch.allclose(data.image_weight, data.step_weight, rtol=0.1)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    plain = collect(model, scheduler_config, image_recipe.model_copy(update={"hessian": True}))
    assert torch.equal(plain.x, data.x)
    assert torch.equal(plain.image_weight, plain.step_weight)


@pytest.mark.usefixtures("states_in_float32")
def test_states_of_a_shifted_flow_have_the_weight_of_the_steps_in_their_group(tiny_dit, image_recipe) -> None:
    model = tiny_dit(out_channels=1)
    data = collect(model, FLOW, image_recipe)
    found = measure(model, FLOW, Sampling("flow", 50, image_recipe.guidance), seed=image_recipe.seed)
    steps = torch.bincount(data.time_groups.index(found.t), minlength=4)
    assert steps[3] > 3 * steps[0] > 0
    density = data.image_weight / found.by_timestep(data.t) / steps[data.group]
    assert torch.allclose(density, density[:1].expand(len(data)), rtol=1e-4)


def test_states_of_a_user_fall_back_to_the_sampler(data) -> None:
    given = (data.x, data.t, data.labels)
    step, image = torch.rand(len(data)), torch.rand(len(data), dtype=torch.float64)
    plain = tqdit.CalibrationSet(*given, step_weight=step, time_groups=data.time_groups)
    assert torch.equal(plain.image_weight, plain.step_weight)
    backwards = tqdit.CalibrationSet(
        *(x.flip(0) for x in given), step_weight=step.flip(0), image_weight=image.flip(0), time_groups=data.time_groups
    )
    at = {float(w): float(v) for w, v in zip(step, image.float(), strict=True)}
    assert backwards.image_weight.tolist() == [at[float(w)] for w in backwards.step_weight]
    with pytest.raises(InputError, match="image_weight must have the shape"):
        tqdit.CalibrationSet(*given, image_weight=image[:3], time_groups=data.time_groups)


@pytest.mark.parametrize("hessian", ["none", "published", "image"])
def test_records_have_the_weight_of_each_rows_state(model, data, tiny_recipe, hessian: Any) -> None:
    weights = 1 + torch.arange(len(data), dtype=torch.float32)
    recipe = tiny_recipe().model_copy(update={"hessian": hessian})
    records = record(model, replace(data, step_weight=weights, image_weight=weights / 64), recipe)
    for found in (*records.linears.values(), *records.attentions.values()):
        assert len(found.image_weight) == len(found.group)
        assert len(found.image_weight.unique()) > 1
        assert torch.equal(found.image_weight * 64, found.step_weight)
    fisher = [found.fisher for found in records.linears.values()]
    assert all(bool((weight == 1).all()) == (hessian == "none") for weight in fisher)


def test_without_the_image_nothing_is_measured(model, scheduler_config, tiny_recipe, monkeypatch) -> None:
    monkeypatch.setattr(trajectories, "measure", None)
    data = collect(model, scheduler_config, tiny_recipe(trajectories=2))
    assert {field.name for field in fields(data)} >= {"step_weight", "image_weight"}
