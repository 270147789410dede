"""All scores of a set of images against a reference, and why some are absent."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from tqdit.evaluation import scores
from tqdit.evaluation.collect import KEPT, Collected
from tqdit.evaluation.moments import Gaussian
from tqdit.evaluation.networks import CLASSES, SPATIAL, Network

FD, SFD, IS, KD = "frechet_distance", "spatial_frechet_distance", "inception_score", "kernel_distance"
PRECISION, RECALL = "precision", "recall"
SCORES = (FD, SFD, IS, PRECISION, RECALL, KD)
NO_IMAGES = "the reference has statistics alone, no images"


@dataclass(frozen=True)
class Measured:
    """The scores by name. `details` say more about some of them, `absent` why a score is missing."""

    scores: dict[str, float]
    details: dict[str, Any]
    absent: dict[str, str]


def settings() -> dict[str, Any]:
    """Return what the protocol says of the scores."""
    return {
        "neighbours": scores.NEIGHBOURS,
        "kernel_subset": scores.SUBSET,
        "kernel_seed": scores.SUBSET_SEED,
        "inception_split": scores.SPLIT,
        "features_kept": KEPT,
    }


def measure(real: Collected, drawn: Collected, network: Network) -> Measured:
    """Return every score that the network and the reference allow.

    With statistics alone these are the Fréchet distances, and the Inception score, which needs no reference. A GPU of
    the network computes them; on other devices the CPU does.
    """
    device = network.device if network.device.type == "cuda" else torch.device("cpu")
    real, drawn = _moved(real, device), _moved(drawn, device)
    found, details, absent = {FD: scores.frechet_distance(drawn.gaussian, real.gaussian)}, {}, {}
    if drawn.spatial is None:
        absent[SFD] = network.missing[SPATIAL]
    elif real.spatial is None:
        absent[SFD] = "the reference has no spatial statistics ('mu_s', 'sigma_s')"
    else:
        found[SFD] = scores.frechet_distance(drawn.spatial, real.spatial)
    if drawn.inception_score is None:
        absent[IS] = network.missing[CLASSES]
    else:
        found[IS] = drawn.inception_score
    if real.features is None:
        absent |= dict.fromkeys((PRECISION, RECALL, KD), NO_IMAGES)
    else:
        assert drawn.features is not None
        found[PRECISION], found[RECALL] = scores.precision_recall(real.features, drawn.features)
        kernel = scores.kernel_distance(real.features, drawn.features)
        found[KD] = kernel.mean
        details[KD] = {"standard_error": kernel.standard_error, "subsets": kernel.subsets, "subset": kernel.subset}
    return Measured({name: found[name] for name in SCORES if name in found}, details, absent)


def _moved(found: Collected, device: torch.device) -> Collected:
    def moved(gaussian: Gaussian | None) -> Gaussian | None:
        return Gaussian(gaussian.mean.to(device), gaussian.covariance.to(device)) if gaussian else None

    features = None if found.features is None else found.features.to(device)
    pooled = moved(found.gaussian)
    assert pooled is not None
    return replace(found, features=features, gaussian=pooled, spatial=moved(found.spatial))
