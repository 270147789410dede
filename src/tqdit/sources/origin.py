"""Say where a quantized model comes from, before any work: recipe, source and versions."""

from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.system.environment import versions


def made_from(source: str, source_sha256: str, recipe: Recipe) -> Provenance:
    """Return the part of an artifact's provenance that is known before the calibration.

    `source`: the model's name. `source_sha256`: the hash of its weights.
    """
    return Provenance(
        preset=recipe.label,
        recipe=recipe.model_dump(mode="json"),
        source=source,
        source_sha256=source_sha256,
        versions=versions(),
    )
