"""Random-probe Fisher weights against the exact diagonal of J^T J."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tqdit.calibration.fisher import Probes, normalized
from tqdit.calibration.recorder import record
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.sampling.guidance import ClassLabels, arguments, predict


def exact_diagonal(function, z: torch.Tensor) -> torch.Tensor:
    """diag(J^T J) in the shape of z."""
    jacobian = torch.autograd.functional.jacobian(function, z)
    return jacobian.reshape(-1, z.numel()).square().sum(0).reshape(z.shape)


def test_probes_converge_to_the_exact_diagonal() -> None:
    w = torch.randn(5, 6)
    source = torch.randn(6, requires_grad=True)
    z, unused = source * 1, source[:3] * 1

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(w @ x.exp())

    probes = Probes(4000)
    probes.watch("z", z, lambda g: g)
    probes.watch("unused", unused, lambda g: g)
    probes.run(function(z), source, torch.randn(4000, 5))
    weights, nothing = probes.means["z"], probes.means["unused"]
    # The relative deviation of one entry is sqrt(2 / 4000) = 2 %.
    assert torch.allclose(weights, exact_diagonal(function, z.detach()), rtol=0.12, atol=1e-6)
    assert not nothing.any()


def test_mean_over_probes_is_of_squares() -> None:
    source = torch.ones(3, requires_grad=True)
    z = source * 1
    probes = Probes(2)
    probes.watch("all", z, lambda g: g)
    probes.watch("picked", z, lambda g: g[1:])
    probes.run(z * 2, source, torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]]))
    assert probes.means["all"].tolist() == [20.0, 16.0, 0.0]
    assert probes.means["picked"].tolist() == [16.0, 0.0]


def substituted(model: nn.Module, name: str, sample, guidance: float):
    """(z -> guided eps with the output of module `name` replaced by z, the float z)."""
    module, seen = model.get_submodule(name), {}

    def run(replacement: torch.Tensor | None = None) -> torch.Tensor:
        def hook(_, __, output):
            seen["z"] = output.detach()
            return replacement

        handle = module.register_forward_hook(hook)
        try:
            x, t, labels = sample
            return predict(model, x, t, *arguments(ClassLabels(10), labels, guidance), guidance)[:, :1]
        finally:
            handle.remove()

    run()
    return run, seen["z"]


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("transformer_blocks.0.ff.fc2_input", ["transformer_blocks.0.ff.net.2"]),
        ("transformer_blocks.1.ff.fc1_input", ["transformer_blocks.1.ff.net.0.proj"]),
        ("transformer_blocks.0.attn1.qkv_input", [f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"]),
    ],
)
def test_recorded_weights_converge_to_those_of_the_guided_output(
    model, data, tiny_recipe, source: str, modules: list[str]
) -> None:
    chosen = (data.x[5:6], data.t[5:6], data.labels[5:6])
    one = CalibrationSet(*chosen, torch.zeros(1, dtype=torch.int64), torch.ones(1), data.conditions, groups=1)
    records = record(model, one, tiny_recipe(groups=1, samples=1, probes=300, rows=10**6, guidance=1.5))
    found = records.linears[source].fisher.unflatten(0, (2, 16)).sum(1)  # (halves, out), over all tokens
    sample = (one.x, one.t, one.labels)
    exact = torch.cat([exact_diagonal(*substituted(model, name, sample, 1.5)) for name in modules], -1).sum(1)
    assert torch.allclose(found, exact, rtol=0.3)
    assert (found.sum(1) / exact.sum(1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_both_guidance_halves_have_their_weight(model, data, tiny_recipe, guidance: float) -> None:
    """A conditional half of the null class has the same Jacobian as the unconditional one: weights g^2, (1-g)^2."""
    null = replace(data, labels=torch.full_like(data.labels, data.conditions.count))
    records = record(model, null, tiny_recipe(rows=10**6, guidance=guidance), batch=len(data))
    for name, linear in records.linears.items():
        cond, uncond = linear.fisher.unflatten(0, (2, -1)).double().sum((1, 2))
        assert cond / uncond == pytest.approx((guidance / (1 - guidance)) ** 2, rel=1e-3), name


def test_gradient_is_not_the_zero_of_a_model_against_itself(records) -> None:
    for name, linear in records.linears.items():
        assert torch.isfinite(linear.fisher).all()
        assert (linear.fisher > 0).float().mean() > 0.99, name
    for name, attention in records.attentions.items():
        assert (attention.fisher_values > 0).float().mean() > 0.99, name
        assert (attention.fisher_scores > 0).float().mean() > 0.9, name


def test_normalized_weights_have_mean_one() -> None:
    weights = normalized(torch.tensor([1.0, 3.0, 0.0]))
    assert weights.mean() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(3)


@pytest.mark.parametrize("weights", [torch.zeros(4), torch.tensor([1.0, float("nan")])])
def test_weights_without_information_are_none(weights: torch.Tensor) -> None:
    assert normalized(weights) is None
