"""The artifact of a traced model that a former version wrote still loads, and computes what it computed then."""

from pathlib import Path

from safetensors.torch import load_file

from tqdit.artifact import folder as artifact
from tqdit.runtime.convert import convert

GOLDEN = Path(__file__).resolve().parent / "golden" / "traced-5"
TOLERANCE = 2e-2  # part of the largest output; see test_golden.py


def test_a_traced_artifact_computes_what_it_did() -> None:
    solution = artifact.read(GOLDEN / "flux")
    assert solution.graph is not None
    assert {linear.source.feed for block in solution.graph.blocks for linear in block.linears} >= {"modulated norm"}
    assert any(params.channels is not None for params in solution.params.values())
    arguments = load_file(GOLDEN / "expected.safetensors")
    expected = arguments.pop("output")
    found = convert(solution, "reference")(**arguments, return_dict=False)[0]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
