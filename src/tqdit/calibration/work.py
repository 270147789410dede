"""Choose the pieces of a work folder from which a run may continue.

They are those of the same settings, versions and kind of device.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdit.calibration.store import HASH_DIGITS, Store, WorkFolder
from tqdit.recipe import CALIBRATION_SETTINGS, Recipe
from tqdit.system.environment import versions

STAGES = ("calibration", "search")  # the stages whose finished work may be kept
PIECES = 7  # raised where a change makes other pieces of the same settings, so that no former run is continued


def stage_store(work: Path | None, stage: str, *depends_on: Any) -> Store | None:
    """Return the store of a stage in a work folder, or None without a folder.

    The folder's name has the hash of all that the pieces depend on.
    """
    if work is None:
        return None
    text = json.dumps([versions(), PIECES, *depends_on], sort_keys=True)
    return WorkFolder(work / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]}")


def calibration_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe on which its calibration depends."""
    return {name: getattr(recipe, name) for name in (*CALIBRATION_SETTINGS, "hessian")}
