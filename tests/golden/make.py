"""Write golden artifacts of the present format: `python tests/golden/make.py` makes tests/golden/format-<version>.

Every format that a release wrote has a folder here, and no folder is ever made again: `tests/test_golden.py` proves
that artifacts written before still load and compute what they computed then. Run this once when the format changes.
The artifacts of a new format are those of the one before, written anew: same codes, scales and outputs on any machine.
What only the new format can hold is an artifact of its own.

    format-N/pipeline      a diffusers pipeline, W6A6 of `plus`: packed codes, time groups, MRQ after softmax
    format-N/plain         a plain folder in shards, W8A8 of `paper`
    format-N/rows          from 4 on: a pipeline of one block, W6A6 of `plus`: rows, channel factors, both ends in float
    format-N/expected.json           sha256 of codes, scales and zero points of every site
    format-N/expected.safetensors    the inputs of a call, and the output of each artifact on backend `reference`
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.artifact import tensors
from tqdit.runtime.convert import convert
from tqdit.sources.resolve import resolve
from tqdit.spec import Solution

TESTS = Path(__file__).resolve().parent.parent

SHARD_BYTES = 30_000
EXPECTED = ("expected.json", "expected.safetensors")
ARTIFACTS = {"pipeline": ("plus", "w6a6", {"softmax_grid": "mrq"}), "plain": ("paper", "w8a8", {})}
ROWS, FIRST_WITH_ROWS = "rows", 4
ROW_SETTINGS = {"input_grid": "row", "attended_grid": "row", "softmax_grid": "row", "gelu_grid": "uniform",
                "gelu_channels": "best", "ends": "float", "hessian": "published"}  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    """A call of three samples in three time groups."""
    generator = torch.Generator().manual_seed(17)
    return {
        "hidden_states": torch.randn(3, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([999, 500, 3]),
        "class_labels": torch.tensor([0, 7, 10]),
    }


def digests(solution: Solution) -> dict[str, str]:
    """sha256 of what each site has: its codes, scales, zero points and channel factors, as plain arrays."""
    found = {f"{name}/codes": codes for name, codes in solution.codes.items()}
    for name, params in solution.params.items():
        found[f"{name}/scale"] = params.scale
        if params.zero_point is not None:
            found[f"{name}/zero_point"] = params.zero_point
        if params.channels is not None:
            found[f"{name}/channels"] = params.channels
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    golden = Path(__file__).resolve().parent
    root = golden / f"format-{tensors.FORMAT_VERSION}"
    former = max(golden.glob("format-*"), key=lambda path: int(path.name.removeprefix("format-")), default=None)
    root.mkdir()  # refuses to make one again
    if former is None:
        _make_first(root)
        return
    for name in names(former):
        solution = artifact.read(former / name)
        workflow.save(solution, resolve(former / name), root / name)
    _make_plain(root / "plain")
    for name in EXPECTED:
        shutil.copyfile(former / name, root / name)
    if ROWS not in names(former) and tensors.FORMAT_VERSION >= FIRST_WITH_ROWS:
        _make_rows(root)


def names(root: Path) -> list[str]:
    """The artifacts of a format."""
    return list(json.loads((root / "expected.json").read_text()))


def _make_rows(root: Path) -> None:
    """Quantize the model of one block, and add what it is and computes to what is stored."""
    sys.path.insert(0, str(TESTS))
    from tiny_dit import build_dit, build_recipe, write_pipeline

    model = build_dit(num_layers=1)
    with torch.no_grad():  # some channels after GELU are large, so that the search chooses factors
        model.transformer_blocks[0].ff.net[0].proj.weight[:4] *= 30
        model.transformer_blocks[0].ff.net[2].weight[:, :4] /= 30
    with tempfile.TemporaryDirectory() as temporary:
        source = write_pipeline(Path(temporary) / "golden-dit", model)
        workflow.quantize(source, root / ROWS, build_recipe("plus", "w6a6", **ROW_SETTINGS))
    solution = artifact.read(root / ROWS)
    assert any(params.channels is not None for params in solution.params.values())
    hashes, expected = json.loads((root / "expected.json").read_text()), load_file(root / "expected.safetensors")
    with torch.inference_mode():
        expected[ROWS] = convert(solution, "reference")(**inputs()).sample
    (root / "expected.json").write_text(json.dumps(hashes | {ROWS: digests(solution)}, indent=0) + "\n")
    save_file(expected, root / "expected.safetensors")


def _make_first(root: Path) -> None:
    """Quantize the models, and store what they are and compute."""
    sys.path.insert(0, str(TESTS))
    from tiny_dit import build_dit, build_recipe, write_pipeline

    expected: dict[str, torch.Tensor] = inputs()
    hashes = {}
    with tempfile.TemporaryDirectory() as temporary:
        source = write_pipeline(Path(temporary) / "golden-dit", build_dit())
        for name, (preset, bits, changes) in ARTIFACTS.items():
            workflow.quantize(source, root / name, build_recipe(preset, bits, **changes))
    _make_plain(root / "plain")
    for name in ARTIFACTS:
        solution = artifact.read(root / name)
        hashes[name] = digests(solution)
        with torch.inference_mode():
            expected[name] = convert(solution, "reference")(**inputs()).sample
    (root / "expected.json").write_text(json.dumps(hashes, indent=0) + "\n")
    save_file(expected, root / "expected.safetensors")


def _make_plain(folder: Path) -> None:
    """Turn a pipeline artifact into the folder of its model alone, with the weights in shards."""
    solution = artifact.read(folder)
    scheduler = (folder / "scheduler" / "scheduler_config.json").read_bytes()
    shutil.rmtree(folder)
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_bytes(scheduler)
    artifact.write(solution, folder, SHARD_BYTES)


if __name__ == "__main__":
    main()
