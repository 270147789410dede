"""Whatever happens to an artifact's files: refused in one line that names a file, or the same pixels as before."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import artifacts
import campaign
import corruption
import readers

SHORT, LONG = 60, 2000


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undamaged")
    artifacts.make_all(root)
    return root


@pytest.fixture(scope="module")
def expected(undamaged) -> dict[str, torch.Tensor]:
    return {kind: readers.pixels(undamaged / kind) for kind in artifacts.KINDS}


def test_the_harness_sees_a_change(undamaged, expected) -> None:
    """Another scheduler, sealed anew, gives other pixels; the same change under the old seal is refused."""
    file = "scheduler/scheduler_config.json"
    edits = {"forged": corruption._resealed, "json": corruption._edit_json}
    found = {}
    for family, edit in edits.items():
        damage = corruption.Damage(
            family, "plain", file, "beta_end = 0.1",
            lambda folder, edit=edit: edit(file, lambda value: {**value, "beta_end": 0.1}, folder), family == "forged",
        )  # fmt: skip
        found[family] = readers.outcome(damage, undamaged, expected)
    assert found["forged"][0] == "legal"
    assert found["json"][0] == "refused"
    assert "scheduler_config.json was changed" in found["json"][1]


@pytest.mark.timeout(120)
def test_some_damages_of_every_family(undamaged, expected) -> None:
    damages = corruption.some_damages(undamaged, SHORT)
    assert len(damages) >= SHORT - 10
    results = [(str(damage), *readers.outcome(damage, undamaged, expected)) for damage in damages]
    assert not [result for result in results if result[1] not in readers.GOOD]
    assert sum(result[1] == "refused" for result in results) > SHORT / 2


@pytest.mark.trust
@pytest.mark.timeout(3600)
def test_very_many_damages() -> None:
    result = campaign.run(LONG)
    print(result["outcomes"], result["by_family"])
    assert result["runs"] >= 1500
    assert not result["failures"], "\n".join(result["first_failures"])
