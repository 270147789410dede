"""Which sampler serves which scheduler class."""

import pytest
from stubs import sample_of

from tqdit.errors import InputError
from tqdit.sampling import diffusion, flow
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.schedules import check_scheduler, family, resolved, schedule


def test_the_served_classes() -> None:
    ddim = ["DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"]
    sigmas = ["LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"]
    solvers = ["KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep"]
    others = [f"{name}Scheduler" for name in (*sigmas, *solvers, "UniPCMultistep", "SASolver")]
    for name in (*ddim, *others):
        check_scheduler({"_class_name": name})
    assert len(diffusion.SERVED) == len(ddim) + len(others)


DIT = sample_of({"in_channels": 1, "out_channels": 2, "sample_size": 8, "patch_size": 2})
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def test_an_unknown_class_is_named_with_all_that_are_served() -> None:
    with pytest.raises(InputError, match="class 'FlowMatchLCMScheduler' is not supported") as refused:
        check_scheduler({"_class_name": "FlowMatchLCMScheduler"})
    assert all(name in str(refused.value) for name in (*diffusion.SERVED, *flow.SERVED))
    with pytest.raises(InputError, match=r"^scheduler_config\.json: scheduler class None is not supported"):
        schedule({"_class_name": None}, Sampling(), DIT)


@pytest.mark.parametrize(
    ("config", "drawing", "calibration"),
    [(None, "ddim", "ddpm"), ({"_class_name": "EulerDiscreteScheduler"}, "ddim", "ddpm"), (FLOW, "flow", "flow")],
)
def test_auto_is_the_sampler_of_the_model(config: dict | None, drawing: str, calibration: str) -> None:
    assert resolved(Sampling(steps=7), config) == Sampling(drawing, 7)
    assert resolved(Sampling(steps=7), config, calibration=True) == Sampling(calibration, 7)
    assert type(schedule(config, Sampling(), DIT)) is (flow.FlowMatching if config is FLOW else diffusion.Diffusion)


@pytest.mark.parametrize(
    ("config", "sampler", "legal"),
    [(FLOW, "ddim", "auto, flow"), (FLOW, "ddpm", "auto, flow"), (None, "flow", "auto, ddim, ddpm")],
)
def test_a_sampler_of_another_process_is_refused(config: dict | None, sampler: str, legal: str) -> None:
    name = "FlowMatchEulerDiscreteScheduler" if config else "DDIMScheduler"
    with pytest.raises(InputError, match=f"sampler '{sampler}' does not suit the model's {name}; legal are {legal}$"):
        schedule(config, Sampling(sampler), DIT)


def test_only_flow_matching_has_its_last_timestep() -> None:
    for config in (None, FLOW):
        low, high, closed = schedule(config, Sampling(), DIT).time_range
        assert (low, high, closed) == (0, 1000, family(config).closed)
    assert family(FLOW).closed
