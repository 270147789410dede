"""fashion-dit and an artifact of it that was calibrated in seconds, loaded to be served.

pytest may load this file before `shared.py`, which tells Triton to interpret kernels. So what imports Triton, as
diffusers does, is imported by the fixtures.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tqdit

if TYPE_CHECKING:
    from tqdit.serving.gallery import Gallery


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its codes are as good as a handful of rows makes them; the tests need codes, not quality."""
    out = tmp_path_factory.mktemp("served") / "fashion-w8a8"
    few = {"samples": 1, "groups": 1, "trajectories": 1, "steps": 4, "rounds": 1, "rows": 64, "queries": 64}
    tqdit.quantize("fashion-dit", out, tqdit.Recipe("paper", "w8a8", hessian="none", candidates=4, **few))
    return out


@pytest.fixture(scope="session")
def side_by_side(artifact: Path) -> "Gallery":
    from tqdit.runtime.target import Target
    from tqdit.serving import gallery

    return gallery.load(["fashion-dit", str(artifact)], Target(device="cpu"), measure=False)
