"""The equivalence test against direct computations, tables, closed forms, and its power and size on drawn samples."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tqdit.errors import InputError
from tqdit.quality import equivalence
from tqdit.quality.equivalence import (
    RESOLUTION,
    Drawn,
    Yardstick,
    closeness,
    jackknife,
    seed_margin,
    squared_errors,
    tost,
    verdicts,
)
from tqdit.quality.features import frechet_distance
from tqdit.quality.kid import frechet_replicates, kid, kid_differences
from tqdit.quality.student import holm, quantile, upper_tail

WIDTH, BLOCKS = 6, 20


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def direct_kid(x: list[list[float]], y: list[list[float]]) -> float:
    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_is_the_double_loop() -> None:
    x, y = normal(5, 3, seed=0), normal(7, 3, seed=1) + 1
    assert kid(x, y) == pytest.approx(direct_kid(x.tolist(), y.tolist()), rel=1e-12)
    assert kid(x.float(), y.float()) == pytest.approx(direct_kid(x.float().tolist(), y.float().tolist()), rel=1e-12)


def test_kid_is_unbiased() -> None:
    values = torch.tensor([kid(normal(8, 3, seed=2 * i), normal(8, 3, seed=2 * i + 1)) for i in range(2000)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0


def test_differences_are_those_of_each_block() -> None:
    x, y, real = normal(12, 3, seed=0), normal(12, 3, seed=1), normal(9, 3, seed=2)
    expected = [kid(x[4 * k : 4 * k + 4], r) - kid(y[4 * k : 4 * k + 4], r) for k, r in enumerate(real.split(3))]
    assert kid_differences(x, y, real, 3).tolist() == expected


@pytest.mark.parametrize(
    ("p", "df", "t"),
    [  # printed tables of Student's t
        (0.95, 1, 6.313752), (0.975, 1, 12.706205), (0.95, 2, 2.919986), (0.975, 5, 2.570582), (0.95, 10, 1.812461),
        (0.95, 19, 1.729133), (0.975, 19, 2.093024), (0.99, 19, 2.539483), (0.9995, 19, 3.883406),
        (0.95, 120, 1.657651), (0.05, 19, -1.729133),
    ],
)  # fmt: skip
def test_student_as_in_tables(p: float, df: int, t: float) -> None:
    assert quantile(p, df) == pytest.approx(t, abs=1e-6)
    assert upper_tail(t, df) == pytest.approx(1 - p, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 7.0, 1e4])
def test_student_closed_forms(t: float) -> None:
    """One degree of freedom is Cauchy's distribution; two have an elementary tail, also where it is tiny."""
    assert upper_tail(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-10)
    root = math.sqrt(2 + t * t)
    assert upper_tail(t, 2) == pytest.approx(1 / (root * (root + t)), rel=1e-10)
    assert upper_tail(-t, 2) == pytest.approx(1 - 1 / (root * (root + t)), rel=1e-10)


def test_student_of_many_degrees_is_normal() -> None:
    for t in (0.5, 2.0, 4.0):
        assert upper_tail(t, 10**6) == pytest.approx(math.erfc(t / math.sqrt(2)) / 2, rel=1e-4)
    assert upper_tail(math.inf, 3) == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_jackknife_of_a_mean_and_of_a_variance() -> None:
    x = normal(30, seed=0)
    without = torch.stack([torch.cat([x[:i], x[i + 1 :]]) for i in range(len(x))])
    found = jackknife(float(x.mean()), without.mean(1))
    assert found.value == pytest.approx(float(x.mean()))
    assert found.standard_error == pytest.approx(float(x.std()) / math.sqrt(30))
    assert found.upper - found.value == pytest.approx(1.699127 * found.standard_error, rel=1e-6)  # 29 degrees
    # The variance over N has a bias of first order, which the jackknife removes.
    found = jackknife(float(x.var(correction=0)), without.var(1, correction=0))
    assert found.value == pytest.approx(float(x.var(correction=1)))


def test_frechet_replicates_leave_a_block_out_of_every_set() -> None:
    sets = [normal(24, 3, seed=i) + 50 for i in range(3)]  # far from 0, where sums of squares would cancel

    def difference(x: torch.Tensor, y: torch.Tensor, real: torch.Tensor) -> float:
        of = [(part.mean(0), torch.cov(part.T)) for part in (x, y, real)]
        return frechet_distance(*of[2], *of[0]) - frechet_distance(*of[2], *of[1])

    value, replicates = frechet_replicates(*sets, blocks=4)
    assert value == pytest.approx(difference(*sets), rel=1e-9)
    for k in range(4):
        rest = [torch.cat([part for i, part in enumerate(s.chunk(4)) if i != k]) for s in sets]
        assert float(replicates[k]) == pytest.approx(difference(*rest), rel=1e-9)


def test_tost_is_both_bounds_within_the_margin() -> None:
    d = normal(BLOCKS, seed=3) * 0.1 + 0.02
    mean, _ = tost(d, 1.0)
    assert mean.upper - mean.value == pytest.approx(1.729133 * float(d.std()) / math.sqrt(BLOCKS), rel=1e-6)
    edge = max(mean.upper, -mean.lower)
    assert tost(d, edge)[1] == pytest.approx(0.05, rel=1e-9)
    assert tost(d, edge * 1.01)[1] < 0.05 < tost(d, edge * 0.99)[1]
    assert tost(-d, edge)[1] == pytest.approx(0.05, rel=1e-9)
    assert tost(torch.zeros(BLOCKS), 0.1)[1] == 0.0
    assert tost(torch.full((BLOCKS,), 0.2), 0.1)[1] == 1.0


@pytest.mark.parametrize("side", [1, -1])
def test_tost_keeps_its_level_at_the_edge_and_has_power_inside(side: int) -> None:
    noise, repeats = normal(1000, BLOCKS, seed=4), 1000
    edge = sum(tost(row + 2 * side, 2.0)[1] <= 0.05 for row in noise) / repeats
    assert 0.03 < edge < 0.07  # 0.05 with a standard deviation of 0.007
    assert sum(tost(row, 2.0)[1] <= 0.05 for row in noise) / repeats > 0.99
    # Noise as large as that of the margin leaves hardly any room.
    wide = sum(tost(row, equivalence.MARGIN / math.sqrt(BLOCKS))[1] <= 0.05 for row in noise) / repeats
    assert 0.05 < wide < 0.35


def test_closeness_is_a_paired_t_test_of_logarithms() -> None:
    ours, bf16 = normal(50, seed=5).exp(), normal(50, seed=6).exp() * 1.5
    ratio = (ours / bf16).log()
    mean, p = closeness(ours, bf16)
    error = float(ratio.std()) / math.sqrt(50)
    assert (mean.value, mean.standard_error) == pytest.approx((float(ratio.mean()), error))
    assert p == pytest.approx(upper_tail(-float(ratio.mean()) / error, 49))
    assert closeness(bf16, ours)[1] == pytest.approx(1 - p)
    shifted, certain = closeness(bf16 / 2, bf16)
    assert shifted.upper == pytest.approx(-math.log(2))
    assert certain < 1e-12


def test_exact_images_never_help() -> None:
    one = torch.ones(10)
    zero = torch.zeros(10)
    tie, p = closeness(zero, zero)
    assert (tie.value, p) == (0.0, 1.0)
    assert closeness(zero, 4 * one)[0].value == 0.0  # no error of ours is known to be below 4
    assert closeness(one, zero)[0].value == pytest.approx(-math.log(RESOLUTION))
    assert closeness(RESOLUTION / 8 * one, zero)[0].value == 0.0
    some = one.clone()
    some[0] = 0
    values = 2 * torch.arange(1.0, 11)
    assert closeness(some, values)[0].value == closeness(one, values)[0].value


@pytest.fixture
def yardstick() -> Yardstick:
    """A float model whose features and pixels are noise; bf16 is off by 0.01."""
    pixels = normal(800, 1, 2, 2, seed=10).clamp(-1, 1)
    reference = Drawn(pixels, normal(800, WIDTH, seed=11))
    bf16 = pixels + 0.01 * normal(800, 1, 2, 2, seed=12)
    return Yardstick(reference, bf16, normal(800, WIDTH, seed=13), normal(1000, WIDTH, seed=14))


def near(yardstick: Yardstick, shift: float, spread: float, off: float, seed: int = 20) -> Drawn:
    pixels = yardstick.reference.pixels
    moved = yardstick.reference.features + shift + spread * normal(800, WIDTH, seed=seed)
    return Drawn(pixels + off * normal(*pixels.shape, seed=seed + 1), moved)


def test_verdicts_of_near_and_shifted_models(yardstick) -> None:
    models = {
        "near": near(yardstick, 0, 0.01, 0.005),
        "coarse": near(yardstick, 0, 0.01, 0.02),
        "shifted": near(yardstick, 0.5, 0.01, 0.005),
    }
    found = verdicts(models, yardstick)
    assert {name: (v.equivalent, v.closer_than_bf16) for name, v in found.items()} == {
        "near": (True, True),
        "coarse": (True, False),
        "shifted": (False, True),
    }
    assert found["shifted"].kid.lower > found["shifted"].margin
    assert found["shifted"].fd.lower > 0.5  # 6 features moved by 0.5 cost 1.5
    assert found["near"].fd.lower < found["near"].fd.value < found["near"].fd.upper
    assert abs(found["near"].fd.value) < 0.02
    expected = seed_margin(kid_differences(yardstick.other_seeds, yardstick.reference.features, yardstick.real, BLOCKS))
    assert {v.margin for v in found.values()} == {expected}
    assert (found["near"].n, found["near"].blocks) == (800, BLOCKS)
    value = json.loads(json.dumps(found["near"].figures(), allow_nan=False))
    assert value["kid"] == {"value": found["near"].kid.value, **value["kid"]}
    assert value["equivalent"] is True


def test_p_values_are_adjusted_for_all_models(yardstick) -> None:
    # Spread and error are chosen so that both p values of a single test lie between 0.05 / 3 and 0.05.
    models = {str(i): near(yardstick, 0, 0.475, 0.00955) for i in range(3)}
    alone, (one, *_) = verdicts({"0": models["0"]}, yardstick)["0"], verdicts(models, yardstick).values()
    assert alone.p_equivalent == alone.p_equivalent_adjusted == one.p_equivalent
    assert one.p_equivalent_adjusted == pytest.approx(min(1, 3 * one.p_equivalent))
    assert one.p_closer_adjusted == pytest.approx(3 * one.p_closer)
    assert (alone.equivalent, alone.closer_than_bf16) == (True, True)
    assert (one.equivalent, one.closer_than_bf16) == (False, False)


def test_the_float_model_itself_is_equivalent_and_exact(yardstick) -> None:
    (found,) = verdicts({"same": yardstick.reference}, yardstick).values()
    assert found.equivalent
    assert (found.kid.value, found.fd.value) == (0.0, 0.0)
    assert (found.exact, found.exact_bfloat16) == (800, 0)
    assert found.closer_than_bf16


def test_without_images_of_bf16_only_equivalence_is_tested(yardstick) -> None:
    models = {"near": near(yardstick, 0, 0.01, 0.005), "shifted": near(yardstick, 0.5, 0.01, 0.005)}
    whole, found = verdicts(models, yardstick), verdicts(models, replace(yardstick, bfloat16=None))
    for name, verdict in found.items():
        assert (verdict.closer_than_bf16, verdict.log_error, verdict.p_closer, verdict.exact_bfloat16) == (None,) * 4
        assert verdict.p_equivalent_adjusted == whole[name].p_equivalent_adjusted
    assert [verdict.equivalent for verdict in found.values()] == [True, False]
    assert json.loads(json.dumps(found["near"].figures(), allow_nan=False))["closer_than_bf16"] is None


def test_bf16_is_not_closer_than_itself(yardstick) -> None:
    (found,) = verdicts({"bf16": replace(yardstick.reference, pixels=yardstick.bfloat16)}, yardstick).values()
    assert not found.closer_than_bf16
    assert found.log_error.value == 0.0


def test_other_seeds_of_the_float_model_seldom_pass() -> None:
    """The margin is 1.96 standard errors, and the test needs room for 1.73."""
    passed = 0
    for repeat in range(100):
        first, other, third = (normal(100, 2, seed=9 * repeat + i) for i in range(3))
        real = normal(100, 2, seed=9 * repeat + 3)
        margin = seed_margin(kid_differences(other, first, real, BLOCKS))
        passed += tost(kid_differences(third, first, real, BLOCKS), margin)[1] <= 0.05
    assert passed < 40


def test_squared_errors_are_of_each_image() -> None:
    x = torch.zeros(2, 3, 2, 2)
    y = x.clone()
    y[1] = 0.5
    assert squared_errors(x, y).tolist() == [0.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(780, WIDTH)}, "ours: 780 rows of features for 800 images"),
        ({"features": torch.zeros(790, WIDTH)}, "ours has 790 rows; 20 blocks need a multiple of 20, at least 40"),
        ({"features": torch.zeros(800, 5)}, r"different widths: \[5, 6\]"),
        ({"features": torch.zeros(800, WIDTH, 1)}, r"ours must be features of shape \[N, D\]"),
        ({"features": torch.full((800, WIDTH), math.nan)}, "ours has features that are NaN or Inf"),
        ({"pixels": torch.zeros(800, 1, 2, 3)}, r"images of ours have shape \[800, 1, 2, 3\]"),
        ({"pixels": torch.full((800, 1, 2, 2), math.inf)}, "images of ours have pixels that are NaN or Inf"),
    ],
)
def test_what_does_not_fit_is_named(yardstick, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        verdicts({"ours": replace(yardstick.reference, **change)}, yardstick)


def test_input_that_no_test_can_take(yardstick) -> None:
    same = replace(yardstick, other_seeds=yardstick.reference.features)
    with pytest.raises(InputError, match="other seeds must differ"):
        verdicts({"ours": yardstick.reference}, same)
    with pytest.raises(InputError, match="at least 2 blocks, got 1"):
        verdicts({"ours": yardstick.reference}, yardstick, blocks=1)
    with pytest.raises(InputError, match="bfloat16 have shape"):
        verdicts({"ours": yardstick.reference}, replace(yardstick, bfloat16=torch.zeros(1)))
    with pytest.raises(InputError, match="same length"):
        closeness(torch.ones(3), torch.ones(4))
    with pytest.raises(InputError, match="at least 2 blocks"):
        jackknife(0.0, torch.ones(1))


@pytest.mark.parametrize("call", [lambda: upper_tail(1, 0), lambda: quantile(1.0, 3), lambda: holm([0.1, 1.2])])
def test_what_is_no_probability_is_refused(call) -> None:
    with pytest.raises(InputError):
        call()
    with pytest.raises(InputError, match="NaN"):
        upper_tail(math.nan, 3)
