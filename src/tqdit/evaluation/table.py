"""Titles of scores, and sentences about the protocol of a table."""

from tqdit.evaluation.results import Evaluation

DIGITS = {
    "frechet_distance": 3, "spatial_frechet_distance": 3, "inception_score": 1, "precision": 3, "recall": 3,
    "kernel_distance": 5,
}  # fmt: skip
PAPERS = {
    "frechet_distance": "FID", "spatial_frechet_distance": "sFID", "inception_score": "IS", "precision": "prec.",
    "recall": "recall", "kernel_distance": "KID",
}  # fmt: skip
OTHERS = PAPERS | {"frechet_distance": "FD", "spatial_frechet_distance": "sFD", "kernel_distance": "KD"}
FEW = 10_000


def titles(evaluation: Evaluation) -> dict[str, str]:
    """Return the title of every score that some row has. Papers' names are for the Inception network alone."""
    known = _titles(evaluation)
    return {name: title for name, title in known.items() if any(name in row.scores for row in evaluation.rows)}


def described(evaluation: Evaluation) -> list[str]:
    """Return sentences about the protocol, and about scores that are absent."""
    protocol = evaluation.protocol
    images, real, network = protocol.images, protocol.reference, protocol.network
    how = ", ".join(f"{key} {images[key]}" for key in ("sampler", "steps", "guidance", "seed") if key in images)
    what = f"{real['images']} images" if real["images"] else "statistics"
    notes = [
        f"{images['num']} images of each model ({how or images['batch']}), reference {real['name']} ({what}), "
        f"features of {network['name']}."
    ]
    if images["num"] < FEW:
        notes.append(f"Fréchet distances of {images['num']} images are biased upwards: compare them in one table only.")
    named: dict[str, list[str]] = {}
    for row in evaluation.rows:
        for name, reason in row.absent.items():
            if name not in named.setdefault(reason, []):
                named[reason].append(name)
    known = _titles(evaluation)
    notes += [f"No {', '.join(known[name] for name in names)}: {reason}." for reason, names in named.items()]
    return notes


def _titles(evaluation: Evaluation) -> dict[str, str]:
    return PAPERS if evaluation.protocol.network["inception"] else OTHERS
