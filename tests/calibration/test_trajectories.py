"""Calibration data: n states per group, from the trajectories of the sampler itself."""

import copy
from dataclasses import fields

import pytest
import torch

from tqdit.architectures import registry
from tqdit.calibration import trajectories
from tqdit.calibration.trajectories import CALIBRATION_STREAM, InBfloat16, collect
from tqdit.errors import InputError
from tqdit.sampling.diffusion import make_scheduler
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.trajectory import noise_generators, trajectory


def equal(a, b) -> bool:
    names = [f.name for f in fields(a) if f.name not in ("conditions", "time_groups")]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.fixture
def tolerance(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> float:
    """How far states may be off that are drawn in a dtype, whatever this CPU would take."""
    bf16 = request.param == "bfloat16"
    monkeypatch.setattr(trajectories, "draws_in_bf16", lambda device: bf16)
    return 0.1 if bf16 else 1e-4  # of states up to 13; torch orders float sums by batch size


in_both = pytest.mark.parametrize("tolerance", ["float32", "bfloat16"], indirect=True)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(("groups", "samples", "steps"), [(4, 4, 20), (10, 3, 50), (3, 5, 7)])
def test_exactly_n_per_group(model, scheduler_config, tiny_recipe, sampler, groups, samples, steps) -> None:
    recipe = tiny_recipe(groups=groups, samples=samples, steps=steps, sampler=sampler)
    data = collect(model, scheduler_config, recipe)
    assert len(data) == groups * samples
    assert data.group.bincount().tolist() == [samples] * groups
    assert (data.t * groups // 1000).tolist() == data.group.tolist()
    visited = make_scheduler(scheduler_config, Sampling(sampler, steps), False).timesteps
    assert set(data.t.tolist()) <= set(visited.tolist())
    assert data.x.shape == (len(data), 1, 8, 8)
    assert data.x.dtype is torch.float32


def test_random_timesteps_of_a_group(model, scheduler_config, tiny_recipe) -> None:
    def picked(seed: int) -> list[int]:
        return collect(model, scheduler_config, tiny_recipe(seed=seed, trajectories=4)).t.tolist()

    assert len({tuple(picked(seed)) for seed in range(3)}) == 3


@in_both
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_states_are_those_of_the_trajectories(model, scheduler_config, tiny_recipe, sampler: str, tolerance) -> None:
    recipe = tiny_recipe(sampler=sampler, trajectories=3)
    data = collect(model, scheduler_config, recipe)
    sampling, sample = Sampling(sampler, recipe.steps, recipe.guidance), registry.sample(registry.config_of(model))
    rerun: dict[tuple[int, int], list[torch.Tensor]] = {}
    for label in data.labels.unique().tolist():
        for index in range(3):
            generators = noise_generators(recipe.seed, [CALIBRATION_STREAM + index])
            chosen = torch.tensor([label])
            for t, x in trajectory(model, scheduler_config, sampling, chosen, generators, data.conditions, sample):
                rerun.setdefault((label, t), []).append(x[0])
    used = set()
    for x, t, label in zip(data.x, data.t.tolist(), data.labels.tolist(), strict=True):
        errors = [(x - state).abs().max().item() for state in rerun[label, t]]
        assert min(errors) < tolerance
        used.add(errors.index(min(errors)))
    assert used == {0, 1, 2}
    assert len(data.labels.unique()) == 3  # every trajectory its own class


def test_seed_decides(model, scheduler_config, tiny_recipe) -> None:
    first, again, other = (collect(model, scheduler_config, tiny_recipe(seed=s)) for s in (0, 0, 1))
    assert equal(first, again)
    assert not torch.equal(first.x, other.x)


@in_both
def test_batch_changes_nothing(model, scheduler_config, tiny_recipe, tolerance) -> None:
    recipe = tiny_recipe(trajectories=4)
    whole = collect(model, scheduler_config, recipe, batch=8)
    for batch in (1, 3):
        parts = collect(model, scheduler_config, recipe, batch=batch)
        assert torch.equal(parts.t, whole.t)
        assert torch.equal(parts.labels, whole.labels)
        assert torch.allclose(parts.x, whole.x, atol=tolerance)


def test_guidance_changes_the_states(model, scheduler_config, tiny_recipe) -> None:
    low, high = (collect(model, scheduler_config, tiny_recipe(guidance=g)) for g in (1.0, 4.0))
    assert not torch.allclose(low.x, high.x, atol=0.01)


def test_too_few_steps_name_the_group(model, scheduler_config, tiny_recipe) -> None:
    with pytest.raises(InputError, match=r"3 steps visit no timestep of time group 3 of 4"):
        collect(model, scheduler_config, tiny_recipe(steps=3))


@pytest.mark.parametrize("trajectories", [1, 9])
def test_impossible_number_of_trajectories(model, scheduler_config, tiny_recipe, trajectories: int) -> None:
    recipe = tiny_recipe(samples=8, steps=20, trajectories=trajectories)  # 5 timesteps of a group: at least 2
    with pytest.raises(InputError, match=f"between 2 and 8 .* got {trajectories}"):
        collect(model, scheduler_config, recipe)


def test_fewest_trajectories_that_give_enough(model, scheduler_config, tiny_recipe) -> None:
    data = collect(model, scheduler_config, tiny_recipe(samples=8, steps=20, trajectories=2))
    assert data.group.bincount().tolist() == [8] * 4
    pairs = list(zip(data.t.tolist(), data.labels.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)  # no state twice


def test_progress_reaches_the_end(model, scheduler_config, tiny_recipe) -> None:
    told: list[float] = []
    collect(model, scheduler_config, tiny_recipe(trajectories=3), told.append, batch=2)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


def test_states_are_drawn_in_bf16_where_that_is_faster(
    model, scheduler_config, tiny_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    for supported in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert trajectories.draws_in_bf16(torch.device("cuda"))
        assert trajectories.draws_in_bf16(torch.device("cpu")) == supported
        assert not trajectories.draws_in_bf16(torch.device("mps"))
        drawn.append(collect(model, scheduler_config, tiny_recipe()))
    assert torch.equal(drawn[0].t, drawn[1].t)
    assert not torch.equal(drawn[0].x, drawn[1].x)
    assert torch.allclose(drawn[0].x, drawn[1].x, atol=0.1)


def test_outputs_in_bf16_are_near_those_in_fp32(model, data) -> None:
    """And returned in fp32."""
    given = {"timestep": data.t, "class_labels": data.labels, "return_dict": False}
    (exact,), (rounded,) = model(data.x, **given), InBfloat16(model)(data.x, **given)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean() / exact.square().mean()
    assert 0 < error < 1e-3


def test_a_copy_in_bf16_leaves_the_model_alone_and_holds_what_is_shared_once(model, data) -> None:
    """Blocks share an embedder in models that this package loads."""
    shared = copy.deepcopy(model)
    first, second = shared.transformer_blocks[:2]
    second.norm1.emb = first.norm1.emb
    rounded = InBfloat16(shared)
    given = {"timestep": data.t, "class_labels": data.labels, "return_dict": False}
    before = shared(data.x, **given)[0]
    rounded(data.x, **given)
    assert torch.equal(shared(data.x, **given)[0], before)
    assert {p.dtype for p in shared.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert len(list(rounded.parameters())) == len(list(shared.parameters())) < len(list(model.parameters()))


@in_both
@pytest.mark.usefixtures("tolerance")
def test_states_that_are_not_finite_are_an_error_that_names_the_timestep(
    tiny_dit, scheduler_config, tiny_recipe
) -> None:
    model = tiny_dit()
    model.proj_out_2.weight.data.mul_(1e38)
    _, *others = make_scheduler(scheduler_config, Sampling("ddim", 4), False).timesteps.tolist()
    recipe = tiny_recipe(sampler="ddim", steps=4, samples=1)
    with pytest.raises(InputError, match=f"NaN or Inf values in the state at timestep ({'|'.join(map(str, others))});"):
        collect(model, scheduler_config, recipe)
