"""Test whether images of a quantized model can be told from the float model's: two tests, decided beforehand.

**Equivalent**: the quantized model's images are as far from real ones as the float model's, within a margin. A block k
of images has d_k = KID(Q_k, R_k) - KID(F_k, R_k), for quantized Q and float F of the same seeds and real R. The margin
is 1.96 standard errors of the same mean difference between F and F', which is the float model with other seeds: what
the choice of seeds alone does to the float model. Two one-sided t tests (Schuirmann 1987) must both reject that the
mean of d_k is outside the margin. The margin is itself an estimate; over 20 blocks it varies by about a sixth. The test
is made for shared seeds. Images of the float model with other seeds pass it only now and then: the standard error of
their d_k is the margin over 1.96, and the test needs room for 1.73 of it.

**Closer than bf16**: the mean over images of log |Q - F|^2 - log |B - F|^2 is below 0, for B of the float model in
bfloat16. The same seeds give a pair for each image.

Holm's correction holds the chance of a wrong yes among all models of one run at 5 %, for each of the two tests.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.quality.kid import check_features, frechet_replicates, kid_differences
from tqdit.quality.student import holm, quantile, upper_tail

BLOCKS = 20
ENOUGH = 2000  # images, from which on a verdict comes without a warning: 100 in each block
ALPHA = 0.05  # level of each one-sided test
MARGIN = 1.96  # standard errors of the difference that other seeds make
RESOLUTION = 2.0**-48  # squared error of one value that is off by the spacing of fp32 numbers below 1


@dataclass(frozen=True)
class Estimate:
    """A mean or difference with its standard error; `lower` and `upper` are its one-sided 95 % bounds."""

    value: float
    standard_error: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Drawn:
    """Images of one model, [N, C, H, W] in [-1, 1], and their features [N, D]."""

    pixels: Tensor
    features: Tensor


@dataclass(frozen=True)
class Yardstick:
    """The sets that quantized models are measured by; image i has the same label in every drawn set.

    `reference`: the float model. `bfloat16`: pixels [N, C, H, W] of the float model in bf16, from the same seeds; None
    leaves the comparison with bf16 out.
    `other_seeds`: features [N, D] of the float model, from other seeds. `real`: features [M, D] of real images.
    """

    reference: Drawn
    bfloat16: Tensor | None
    other_seeds: Tensor
    real: Tensor


@dataclass(frozen=True)
class Verdict:
    """The outcome of both tests for one model.

    `kid` estimates the mean of d_k, `log_error` the mean log ratio of squared errors to bf16's, and `fd` the difference
    of Frechet distances with its jackknife standard error, to be read beside them: no decision rests on it. The bounds
    are of single tests; the decisions are by the adjusted p values. `exact` and `exact_bfloat16` count images without
    any error. What compares with bf16 is None where the yardstick has no images of it.
    """

    n: int
    blocks: int
    kid: Estimate
    margin: float
    p_equivalent: float
    p_equivalent_adjusted: float
    equivalent: bool
    log_error: Estimate | None
    p_closer: float | None
    p_closer_adjusted: float | None
    closer_than_bf16: bool | None
    exact: int
    exact_bfloat16: int | None
    fd: Estimate

    def figures(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return asdict(self)


def verdicts(models: Mapping[str, Drawn], yardstick: Yardstick, blocks: int = BLOCKS) -> dict[str, Verdict]:
    """Return the verdict of every model, corrected for their number.

    All tensors of features are on one device, and all pixels are on one. Raises `InputError` for sets of different
    sizes, a number of images that is no multiple of `blocks`, values that are not finite, and a margin of 0.
    """
    for name, drawn in models.items():
        _check(name, drawn, yardstick, blocks)
    real, reference = yardstick.real, yardstick.reference
    margin = seed_margin(kid_differences(yardstick.other_seeds, reference.features, real, blocks))
    closer = _closer(models, yardstick)
    kids = {
        name: tost(kid_differences(drawn.features, reference.features, real, blocks), margin)
        for name, drawn in models.items()
    }
    equivalent = dict(zip(models, holm([p for _, p in kids.values()]), strict=True))
    return {
        name: Verdict(
            n=len(drawn.pixels),
            blocks=blocks,
            kid=kids[name][0],
            margin=margin,
            p_equivalent=kids[name][1],
            p_equivalent_adjusted=equivalent[name],
            equivalent=equivalent[name] <= ALPHA,
            exact=int((squared_errors(drawn.pixels, reference.pixels) == 0).sum()),
            **closer[name],
            fd=jackknife(*frechet_replicates(drawn.features, reference.features, real, blocks)),
        )
        for name, drawn in models.items()
    }


def _closer(models: Mapping[str, Drawn], yardstick: Yardstick) -> dict[str, dict[str, Any]]:
    """Return the fields of each verdict that compare with bf16, all None without images of it."""
    fields = ("log_error", "p_closer", "p_closer_adjusted", "closer_than_bf16", "exact_bfloat16")
    if yardstick.bfloat16 is None:
        return {name: dict.fromkeys(fields) for name in models}
    pixels = yardstick.reference.pixels
    bf16 = squared_errors(yardstick.bfloat16, pixels)
    errors = [closeness(squared_errors(drawn.pixels, pixels), bf16) for drawn in models.values()]
    adjusted, exact = holm([p for _, p in errors]), int((bf16 == 0).sum())
    rows = zip(models, errors, adjusted, strict=True)
    return {name: dict(zip(fields, (mean, p, q, q <= ALPHA, exact), strict=True)) for name, (mean, p), q in rows}


def seed_margin(differences: Tensor) -> float:
    """Return 1.96 standard errors of the mean of the differences d_k that other seeds make, [blocks].

    Raises `InputError` where the seeds make no difference at all: nothing can be inside a margin of 0.
    """
    margin = MARGIN * _mean(differences).standard_error
    if margin == 0:
        raise InputError("the float model's images from other seeds must differ from its first ones")
    return margin


def tost(differences: Tensor, margin: float) -> tuple[Estimate, float]:
    """Return the mean of d_k, [blocks], and the p value of two one-sided t tests that it lies within +-margin.

    The p value is the larger of the two. It is at most 0.05 just where both one-sided 95 % bounds lie within the
    margin.
    """
    mean, df = _mean(differences), len(differences) - 1
    p = max(_p_above(margin - mean.value, mean, df), _p_above(margin + mean.value, mean, df))
    return mean, p


def squared_errors(pixels: Tensor, reference: Tensor) -> Tensor:
    """Return the sum of squared differences of every image, float64 [N], on the CPU."""
    return (pixels.double() - reference.double()).square().flatten(1).sum(1).cpu()


def closeness(errors: Tensor, bf16: Tensor) -> tuple[Estimate, float]:
    """Return the mean of log(errors) - log(bf16), [N] each, and the p value of a t test that it is below 0.

    An error of exactly 0 has no logarithm, so it is replaced by the value that speaks most against the model, and
    never by one that helps it. Where both errors are 0 the pair counts as a tie, a difference of 0. Where the model's
    alone is 0, the smallest positive error of either set stands for it. Where bf16's alone is 0, the square of the
    spacing of fp32 numbers below 1 stands for it, or the smallest positive error if that is smaller still.
    """
    if errors.shape != bf16.shape or errors.ndim != 1 or len(errors) < 2:
        raise InputError(f"errors must be two lists of the same length, got {list(errors.shape)}, {list(bf16.shape)}")
    positive = torch.cat([errors[errors > 0], bf16[bf16 > 0]])
    smallest = float(positive.min()) if len(positive) else 1.0
    ours = torch.where(errors > 0, errors, smallest)
    other = torch.where(bf16 > 0, bf16, min(smallest, RESOLUTION))
    ratio = (ours.log() - other.log()).masked_fill((errors == 0) & (bf16 == 0), 0.0)
    mean = _mean(ratio)
    return mean, _p_above(-mean.value, mean, len(ratio) - 1)


def jackknife(value: float, replicates: Tensor) -> Estimate:
    """Return a statistic without its first-order bias, from its values without each block, [blocks].

    The estimate is B value - (B - 1) mean, and its variance (B - 1) / B times the sum of squares of the replicates
    about their mean (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11). The bounds are by
    Student's t with B - 1 degrees of freedom.
    """
    count = len(replicates)
    if count < 2:
        raise InputError(f"a jackknife needs at least 2 blocks, got {count}")
    mean = float(replicates.double().mean())
    error = math.sqrt((count - 1) / count * float((replicates.double() - mean).square().sum()))
    return _estimate(count * value - (count - 1) * mean, error, count - 1)


def _mean(values: Tensor) -> Estimate:
    """Return the mean of independent values with its standard error."""
    values = values.double()
    error = float(values.std(correction=1)) / math.sqrt(len(values))
    return _estimate(float(values.mean()), error, len(values) - 1)


def _estimate(value: float, error: float, df: int) -> Estimate:
    reach = quantile(1 - ALPHA, df) * error
    return Estimate(value, error, value - reach, value + reach)


def _p_above(distance: float, mean: Estimate, df: int) -> float:
    """Return the p value for a `distance` that shall be above 0; a mean without any spread is certain."""
    if mean.standard_error == 0:
        return 0.0 if distance > 0 else 1.0
    return upper_tail(distance / mean.standard_error, df)


def _check(name: str, drawn: Drawn, yardstick: Yardstick, blocks: int) -> None:
    """Raise `InputError` naming what does not fit the float model's images."""
    reference = yardstick.reference
    sets = {name: drawn.features, "the float model": reference.features, "other seeds": yardstick.other_seeds}
    check_features(blocks, **sets, **{"real images": yardstick.real})
    for label, features in sets.items():
        if len(features) != len(reference.pixels):
            raise InputError(f"{label}: {len(features)} rows of features for {len(reference.pixels)} images")
    for label, pixels in {name: drawn.pixels, "bfloat16": yardstick.bfloat16}.items():
        if pixels is None:
            continue
        if pixels.shape != reference.pixels.shape:
            shapes = f"{list(pixels.shape)}, the float model's {list(reference.pixels.shape)}"
            raise InputError(f"images of {label} have shape {shapes}")
        if not pixels.isfinite().all():
            raise InputError(f"images of {label} have pixels that are NaN or Inf")
