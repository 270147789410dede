"""Provenance: what an artifact says of its making, read and written without loss."""

import copy
import json
import pickle

import pytest

from tqdit.errors import InputError
from tqdit.provenance import Provenance

FULL = {
    "preset": "plus",
    "recipe": {"preset": "plus", "weight_bits": 6, "activation_bits": 8},
    "source": "a model",
    "source_sha256": "0" * 64,
    "versions": {"torch": "2.9"},
    "calibration_sha256": "1" * 64,
}


@pytest.mark.parametrize("value", [{}, FULL, {**FULL, "seed": 3, "further": {"a": [1]}}, {"recipe": {"bits": None}}])
def test_round_trip_keeps_every_key_and_its_order(value: dict) -> None:
    found = Provenance.from_json(value)
    assert json.dumps(found.to_json()) == json.dumps(value)
    assert Provenance.from_json(found.to_json()) == found
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == found


def test_what_is_read_by_name() -> None:
    found = Provenance.from_json({**FULL, "seed": 3})
    assert (found.preset, found.source, found.versions["torch"]) == ("plus", "a model", "2.9")
    assert (found.weight_bits, found.activation_bits, found.bits) == (6, 8, "w6a8")
    assert found.further == {"seed": 3}
    assert Provenance(recipe={"preset": "paper"}).preset_name == "paper"
    assert Provenance().weight_bits is None


def test_null_is_as_good_as_absent() -> None:
    assert Provenance.from_json(dict.fromkeys(FULL)) == Provenance()


def test_nothing_can_be_changed() -> None:
    value = copy.deepcopy(FULL)
    found = Provenance.from_json(value)
    value["recipe"]["weight_bits"] = 2
    found.to_json()["recipe"]["weight_bits"] = 3
    with pytest.raises(TypeError):
        found.recipe["weight_bits"] = 4
    assert found.weight_bits == 6


@pytest.mark.parametrize("value", [{"preset": 1}, {"recipe": []}, {"versions": {"torch": 2}}, {"source_sha256": {}}])
def test_wrong_types_are_named(value: dict) -> None:
    with pytest.raises(InputError, match="provenance: "):
        Provenance.from_json(value)
