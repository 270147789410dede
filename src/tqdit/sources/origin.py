"""Say where a quantized model comes from, before any work: recipe, source and versions."""

from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.system.environment import versions

CONDITIONS = "conditions_sha256"  # an entry of provenance beside those that every artifact has


def made_from(source: str, source_sha256: str, recipe: Recipe, conditions_sha256: str | None = None) -> Provenance:
    """Return the part of an artifact's provenance that is known before the calibration.

    `source`: the model's name. `source_sha256`: the hash of its weights. `conditions_sha256`: the hash of the
    calibration's conditions, or None if they are the model's own classes.
    """
    return Provenance(
        preset=recipe.label,
        recipe=recipe.model_dump(mode="json"),
        source=source,
        source_sha256=source_sha256,
        versions=versions(),
        further={} if conditions_sha256 is None else {CONDITIONS: conditions_sha256},
    )
