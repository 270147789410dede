"""The reverse process against an implementation written from its equations."""

from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from stubs import run
from torch import nn

from tqdit.errors import InputError
from tqdit.imaging.generate import sample_batches
from tqdit.sampling import diffusion
from tqdit.sampling.diffusion import make_scheduler, step_weights
from tqdit.sampling.guidance import ClassLabels, Sampling, arguments, predict
from tqdit.sampling.trajectory import noise_generators

LABELS = torch.tensor([3, 7, 3])


class Reverse:
    """p(x_{t-1} | x_t) with a linear beta schedule, float64; `steps` timesteps evenly from 0."""

    def __init__(self, config: dict, steps: int) -> None:
        total = config["num_train_timesteps"]
        betas = torch.linspace(config["beta_start"], config["beta_end"], total, dtype=torch.float64)
        self.alpha_bar = (1 - betas).cumprod(0)
        self.timesteps = [i * (total // steps) for i in reversed(range(steps))]

    def pairs(self):
        """(t, alpha_bar_t, alpha_bar of the next state)."""
        for t, following in pairwise([*self.timesteps, None]):
            yield t, self.alpha_bar[t], 1.0 if following is None else self.alpha_bar[following]


def guided(model: nn.Module, x: torch.Tensor, t: int, labels: torch.Tensor, guidance: float):
    """(eps, v), the conditional and the unconditional prediction made apart."""

    def run(classes: torch.Tensor) -> torch.Tensor:
        steps = torch.full((len(x),), t)
        return model(x.float(), timestep=steps, class_labels=classes, return_dict=False)[0].double()

    cond, uncond = run(labels), run(torch.full_like(labels, 10))
    eps = uncond[:, :1] + guidance * (cond[:, :1] - uncond[:, :1])
    return eps, cond[:, 1:]


def noises(seed: int, count: int, steps: int) -> torch.Tensor:
    """(steps + 1, count, 1, 8, 8): every image's own stream, the initial state first."""
    streams = [torch.stack([torch.randn(1, 8, 8, generator=g) for _ in range(steps + 1)])
               for g in noise_generators(seed, range(count))]  # fmt: skip
    return torch.stack(streams, 1).double()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [1.0, 1.5, 0.0])
def test_ddim(model, scheduler_config, guidance: float) -> None:
    sampling = Sampling("ddim", 10, guidance)
    states = list(run(model, scheduler_config, sampling, LABELS, noise_generators(5, range(3))))
    x = noises(5, 3, 0)[0]
    for (t, a, a_next), (our_t, ours) in zip(Reverse(scheduler_config, 10).pairs(), states, strict=False):
        assert t == our_t
        assert_same(ours, x)
        eps, _ = guided(model, x, t, LABELS, guidance)
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x_0 + (1 - a_next) ** 0.5 * eps
    assert len(states) == 11
    assert states[-1][0] is None
    assert_same(states[-1][1], x)


@torch.inference_mode()
def test_ddpm_with_learned_variance(model, scheduler_config) -> None:
    sampling = Sampling("ddpm", 10, 1.5)
    states = list(run(model, scheduler_config, sampling, LABELS, noise_generators(5, range(3))))
    noise = noises(5, 3, 10)
    x = noise[0]
    for step, (t, a, a_next) in enumerate(Reverse(scheduler_config, 10).pairs()):
        assert_same(states[step][1], x)
        eps, v = guided(model, x, t, LABELS, 1.5)
        alpha = a / a_next
        beta = 1 - alpha
        mean = (x - beta / (1 - a) ** 0.5 * eps) / alpha**0.5
        if t == 0:
            x = mean
            break
        small = beta * (1 - a_next) / (1 - a)
        variance = torch.exp((v + 1) / 2 * torch.log(beta) + (1 - (v + 1) / 2) * torch.log(small))
        x = mean + variance**0.5 * noise[step + 1]
    assert_same(states[-1][1], x)


STUB = {"in_channels": 1, "out_channels": 2, "sample_size": 4, "num_embeds_ada_norm": 10}


class Constant(nn.Module):
    """Returns eps = 0 and a constant v."""

    config = STUB

    def __init__(self, v: float) -> None:
        super().__init__()
        self.v = v

    def forward(self, x: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (torch.cat([torch.zeros_like(x), torch.full_like(x, self.v)], 1),)


@pytest.mark.parametrize(("sampler", "matters"), [("ddpm", True), ("ddim", False)])
def test_ddpm_does_not_drop_the_learned_variance(scheduler_config, sampler: str, matters: bool) -> None:
    results = []
    for v in (-1.0, 1.0):
        states = run(Constant(v), scheduler_config, Sampling(sampler, 10), LABELS, noise_generators(0, range(3)))
        *_, (_, x) = states
        results.append(x)
    assert torch.equal(*results) != matters
    if matters:
        assert results[1].std() > results[0].std()  # beta is the larger variance


def test_model_without_learned_variance_samples_with_a_fixed_one(tiny_dit, scheduler_config) -> None:
    model = tiny_dit(out_channels=1)
    *_, (t, x) = run(model, scheduler_config, Sampling("ddpm", 5), LABELS, noise_generators(0, range(3)))
    assert t is None
    assert torch.isfinite(x).all()


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_guided_prediction_of_the_model(model, data, guidance: float) -> None:
    t = torch.full((4,), 350)
    eps, v = guided(model, data.x[:4], 350, data.labels[:4], guidance)
    out = predict(model, data.x[:4], t, *arguments(ClassLabels(10), data.labels[:4], guidance), guidance)
    assert torch.allclose(out.double(), torch.cat([eps, v], 1), atol=1e-5)


# Schedulers, noise ---------------------------------------------------------------------------------------------------


def test_scheduler_keeps_the_config_of_the_model(scheduler_config) -> None:
    scheduler = make_scheduler(scheduler_config, Sampling("ddpm", 20), learned_variance=True)
    assert scheduler.config.beta_end == scheduler_config["beta_end"]
    assert scheduler.config.variance_type == "learned_range"
    assert not scheduler.config.clip_sample


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("fixed_large", "fixed_large"),
        ("learned_range", "fixed_small"),
        ("learned", "fixed_small"),
        (None, "fixed_small"),
    ],
)
def test_fixed_variance_of_a_model_that_has_no_v(scheduler_config, given: str | None, used: str) -> None:
    config = {**scheduler_config, "variance_type": given}
    assert make_scheduler(config, Sampling("ddpm", 20), False).config.variance_type == used
    assert make_scheduler(config, Sampling("ddpm", 20), True).config.variance_type == "learned_range"
    assert make_scheduler(scheduler_config, Sampling("ddpm", 20), False).config.variance_type == "fixed_small"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_are_clipped_only_where_the_config_says_so(scheduler_config, sampler: str) -> None:
    """DiT samples latents, which have no range of their own."""
    silent = {key: value for key, value in scheduler_config.items() if key != "clip_sample"}
    assert not make_scheduler(silent, Sampling(sampler, 10), False).config.clip_sample
    assert make_scheduler({**silent, "clip_sample": True}, Sampling(sampler, 10), False).config.clip_sample


def test_default_schedule_is_that_of_dit() -> None:
    config = make_scheduler(None, Sampling("ddim", 20), False).config
    assert (config.num_train_timesteps, config.beta_schedule, config.clip_sample) == (1000, "linear", False)
    assert (config.beta_start, config.beta_end) == (0.0001, 0.02)


def test_more_steps_than_timesteps_is_an_error(scheduler_config) -> None:
    with pytest.raises(InputError, match="at most the 1000 training timesteps, got 1001"):
        make_scheduler(scheduler_config, Sampling("ddim", 1001), False)


@pytest.mark.parametrize(
    ("offset", "steps", "said"), [(1, 1000, "1000 to 1,"), (51, 20, "1001 to 51,"), (-1, 10, "899 to -1,")]
)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_steps_that_an_offset_moves_out_of_the_schedule_are_refused(
    scheduler_config, sampler: str, offset: int, steps: int, said: str
) -> None:
    config = {**scheduler_config, "num_train_timesteps": 1000, "steps_offset": offset}
    with pytest.raises(
        InputError, match=f"steps_offset {offset} puts {steps} steps at timesteps {said} the model has 999 to 0"
    ):
        make_scheduler(config, Sampling(sampler, steps), False)
    legal = make_scheduler({**config, "steps_offset": 1}, Sampling(sampler, 999), False)
    assert legal.timesteps.tolist() == list(range(999, 0, -1))
    assert make_scheduler({**config, "steps_offset": 0}, Sampling(sampler, steps), False).timesteps.min() == 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_every_timestep_may_be_a_step(scheduler_config, sampler: str) -> None:
    scheduler = make_scheduler({**scheduler_config, "num_train_timesteps": 30}, Sampling(sampler, 30), False)
    assert scheduler.timesteps.tolist() == list(range(29, -1, -1))
    assert make_scheduler(scheduler_config, Sampling(sampler, 20), False).timesteps.tolist() == list(
        range(950, -1, -50)
    )


@pytest.mark.parametrize(
    "bad",
    [{"beta_schedule": "cubic"}, {"beta_start": "small"}, {"timestep_spacing": "odd"}, {"prediction_type": "flow"}],
)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_scheduler_config_that_diffusers_refuses(scheduler_config, sampler: str, bad: dict) -> None:
    with pytest.raises(InputError, match=r"scheduler_config\.json"):
        make_scheduler({**scheduler_config, **bad}, Sampling(sampler, 10), False)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_that_schedulers_know_is_kept(scheduler_config, prediction: str) -> None:
    scheduler = make_scheduler({**scheduler_config, "prediction_type": prediction}, Sampling("ddim", 10), False)
    assert scheduler.config.prediction_type == prediction


@pytest.mark.parametrize(("out_channels", "learned"), [(None, False), (1, False), (2, True)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_v_is_what_a_model_returns_beyond_its_input_channels(
    scheduler_config, monkeypatch, sampler: str, out_channels: int | None, learned: bool
) -> None:
    model = Constant(0.0)
    monkeypatch.setattr(model, "config", {**STUB, "out_channels": out_channels}, raising=False)
    made: list[bool] = []

    def watched(config, sampling, learned_variance):
        made.append(learned_variance)
        return make_scheduler(config, sampling, learned_variance)

    monkeypatch.setattr(diffusion, "make_scheduler", watched)
    states = list(run(model, scheduler_config, Sampling(sampler, 4), LABELS, noise_generators(0, range(3))))
    assert made == [learned]
    assert all(x.shape == (3, 1, 4, 4) for _, x in states)


@pytest.mark.parametrize(("out_channels", "learned"), [(None, False), (2, False), (4, True)])
def test_v_has_as_many_channels_as_the_input(
    scheduler_config, monkeypatch, out_channels: int | None, learned: bool
) -> None:
    """With v = 1 the variance is another than with the fixed one; a model of 2 channels without v ends as v = -1."""
    config = {**STUB, "in_channels": 2, "out_channels": out_channels}

    def last(v: float) -> torch.Tensor:
        model = Constant(v)
        monkeypatch.setattr(model, "config", config, raising=False)
        return list(run(model, scheduler_config, Sampling("ddpm", 4), LABELS, noise_generators(0, range(3))))[-1][1]

    assert torch.equal(last(1.0), last(-1.0)) != learned


def test_a_refusal_is_one_line_of_what_diffusers_says(scheduler_config, monkeypatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ValueError("\n the reason\nand a hint")

    monkeypatch.setattr(DDIMScheduler, "from_config", refused)
    with pytest.raises(InputError, match=r"^scheduler_config\.json: diffusers refuses it: the reason$"):
        make_scheduler(scheduler_config, Sampling("ddim", 10), False)


DEFAULTS = {
    "num_train_timesteps": 300,
    "beta_start": 0.001,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


def test_what_a_config_leaves_out_is_the_default_of_its_class(monkeypatch) -> None:
    class OtherDefaults:
        def __init__(
            self,
            num_train_timesteps=300,
            beta_start=0.001,
            beta_end=0.03,
            beta_schedule="scaled_linear",
            trained_betas=None,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            clip_sample=True,
        ) -> None: ...

    monkeypatch.setattr(diffusers, "DDIMParallelScheduler", OtherDefaults)

    def served(config: dict) -> dict:
        scheduler = make_scheduler(config, Sampling("ddim", 10), False)
        assert not scheduler.config.clip_sample  # is no setting of the process
        return {name: scheduler.config[name] for name in DEFAULTS}

    assert served({"_class_name": "DDIMParallelScheduler"}) == DEFAULTS
    assert served({"_class_name": "DDIMParallelScheduler", "_use_default_values": list(DEFAULTS)}) == DEFAULTS
    assert served({"_class_name": "DDIMParallelScheduler", "beta_end": 0.5}) == DEFAULTS | {"beta_end": 0.5}
    assert served({})["beta_end"] == 0.02


def test_an_image_of_a_seed_is_the_same_in_every_version() -> None:
    """The streams of (seed, index) are part of what a command line means; those of any two pairs are distinct."""
    assert [g.initial_seed() for g in noise_generators(2, [0, 5])] == [2_000_006, 2_000_011]
    assert [g.device.type for g in noise_generators(0, range(2))] == ["cpu", "cpu"]


def test_noise_depends_on_seed_and_index_alone() -> None:
    def draw(seed: int, indices) -> list[list[float]]:
        return [torch.randn(4, generator=g).tolist() for g in noise_generators(seed, indices)]

    assert draw(0, range(6))[2:4] == draw(0, [2, 3])
    distinct = {tuple(x) for seed in range(3) for x in draw(seed, range(4))}
    assert len(distinct) == 12


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_image_i_is_the_same_in_every_batch_and_shard(model, scheduler_config, sampler: str) -> None:
    classes = [0, 4, 4, 9, 1]
    sampling = Sampling(sampler, 5, 1.5)

    def images(members: slice, batch: int) -> torch.Tensor:
        indices = range(5)[members]
        division = [indices[first : first + batch] for first in range(0, len(indices), batch)]
        return torch.cat(list(sample_batches(model, scheduler_config, classes, sampling, 11, division)))

    whole = images(slice(0, 5), 16)
    for batch in (1, 2, 5):
        assert_same(images(slice(0, 5), batch), whole)
    assert_same(images(slice(2, 5), 16), whole[2:])
    assert not torch.allclose(whole[1], whole[2], atol=0.1)  # same class, other noise


def test_step_weights_are_what_a_ddim_step_does_with_an_error_of_epsilon() -> None:
    """At every timestep of a 50-step run: the square of d x_next / d epsilon, relative to the largest."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(50)
    x, eps = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    slopes = {}
    for t in scheduler.timesteps.tolist():
        moved = scheduler.step(eps + 1, t, x).prev_sample - scheduler.step(eps, t, x).prev_sample
        slopes[t] = float(moved.square().mean())
    weights = step_weights(scheduler, steps=50)
    largest = slopes[max(slopes)] / float(weights[max(slopes)])
    assert weights.shape == (1000,)
    assert float(weights.max()) == 1
    for t, slope in slopes.items():
        assert float(weights[t]) == pytest.approx(slope / largest, rel=1e-3)


# Step weights --------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
    "last alpha is that of t = 0": {"set_alpha_to_one": False},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_step_weights_are_what_a_step_of_the_scheduler_does(schedule: str, prediction: str) -> None:
    """Squared differences of diffusers' own DDIM step, up to one factor; but where epsilon's has no bound."""
    config = DDIMScheduler(clip_sample=False, prediction_type=prediction, **SCHEDULES[schedule]).config
    scheduler = make_scheduler(config, Sampling("ddim", 50), True)
    weights = step_weights(scheduler).double()
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.max() == 1
    bounded = weights.max() / weights.median() >= 15.9
    moved = {}
    for t in range(0, 1000, 37):
        if float(scheduler.alphas_cumprod[t]) == 0 and prediction == "epsilon":
            continue
        x = torch.zeros(1, dtype=torch.float64)
        moved[t] = float(scheduler.step(x + 1, t, x).prev_sample - scheduler.step(x, t, x).prev_sample) ** 2
    reference = 481  # in the middle, where no factor is bounded
    for t, expected in moved.items():
        found = float(weights[t] / weights[reference])
        if prediction == "epsilon" and bounded and float(weights[t]) == 1:
            assert expected / moved[reference] >= 0.99 * found  # cut
        else:
            assert found == pytest.approx(expected / moved[reference], rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_no_few_timesteps_have_all_the_weight(schedule: str, prediction: str) -> None:
    config = DDIMScheduler(clip_sample=False, prediction_type=prediction, **SCHEDULES[schedule]).config
    weights = step_weights(make_scheduler(config, Sampling("ddim", 50), True)).double()
    assert weights.sum() ** 2 / weights.square().sum() > 50  # effective number of 1000


@pytest.mark.parametrize(("spacing", "legal"), [("trailing", False), ("leading", True)])
def test_epsilon_says_nothing_where_nothing_is_left_of_the_image(spacing: str, legal: bool) -> None:
    config = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing=spacing, clip_sample=False).config
    if legal:  # no step begins at the last timestep
        assert 999 not in make_scheduler(config, Sampling("ddim", 20), True).timesteps
    else:
        with pytest.raises(InputError, match="rescale_betas_zero_snr"):
            make_scheduler(config, Sampling("ddim", 20), True)


@pytest.mark.parametrize("beta_end", [float("nan"), 2.0, -0.5])
def test_betas_of_no_process(beta_end: float) -> None:
    config = dict(DDIMScheduler(clip_sample=False).config) | {"beta_end": beta_end}
    with pytest.raises(InputError, match="betas that are not between 0 and 1"):
        make_scheduler(config, Sampling("ddim", 20), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_start": 0.0, "beta_end": 0.0}, "betas of 0 after the first"),
        ({"trained_betas": [0.0] * 900 + [0.01] * 100}, "betas of 0 after the first"),
        ({"trained_betas": [0.1, 0.2]}, "it has 2 betas for 1000 training timesteps"),
        ({"beta_start": 0.0, "prediction_type": "sample"}, "its first beta is 0"),
        ({"beta_end": 1.0}, "nothing of the image is left at timestep 999, where"),
        ({"beta_end": 0.9, "timestep_spacing": "leading"}, "nothing of the image is left at timestep 950, where"),
        ({"rescale_betas_zero_snr": True}, r"left at timestep 999 \(rescale_betas_zero_snr makes it so\), where"),
    ],
)
def test_a_schedule_whose_steps_are_undefined_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"scheduler_config\\.json: .*{message}"):
        make_scheduler({"clip_sample": False, "timestep_spacing": "trailing", **settings}, Sampling("ddim", 20), True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_first_beta_of_0_gives_finite_weights(prediction: str) -> None:
    config = {"beta_start": 0.0, "prediction_type": prediction}
    weights = step_weights(make_scheduler(config, Sampling("ddim", 20), True))
    assert torch.isfinite(weights).all()
    assert weights.max() == 1


def test_a_weight_of_epsilon_is_at_most_16_times_the_median() -> None:
    """Where the last cumulative alpha is 0, no bound but this one is left."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"}
    weights = step_weights(make_scheduler(config, Sampling("ddim", 20), True)).double()
    assert weights.max() == 1
    assert float(weights.max() / weights.median()) == pytest.approx(16, rel=1e-6)


def test_step_weights_of_as_many_steps_as_timesteps_or_more() -> None:
    scheduler = make_scheduler({"num_train_timesteps": 40}, Sampling("ddim", 20), True)
    every = step_weights(scheduler, 40)
    assert every.shape == (40,)
    assert torch.equal(step_weights(scheduler, 41), every)
    assert not torch.equal(step_weights(scheduler, 20), every)
