"""Write the artifact of a traced model, which later versions have to load, and what it computes.

python tests/golden/make_traced.py

It refuses to write it again: an artifact that a version wrote is what its users have.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "models"))

from zoo import ZOO, Entry  # noqa: E402

import tqdit  # noqa: E402
from tqdit.runtime.convert import convert  # noqa: E402

ROOT = Path(__file__).resolve().parent / "traced-5"
FLUX = ZOO["FluxTransformer2DModel"]
ENTRY = Entry(FLUX.name, {**FLUX.config, "num_layers": 1, "num_single_layers": 1}, FLUX.arguments, FLUX.timestep)
UNSEEN = 9


def main() -> None:
    torch.set_num_threads(1)
    ROOT.mkdir()
    model = ENTRY.build().requires_grad_(False)
    with tqdit.record(model, per_group=2) as calls:
        for seed in range(4):
            model(**ENTRY.call(seed))
    recipe = tqdit.Recipe("plus", "w6a8", samples=2, rows=64, candidates=10, rounds=1, input_grid="best")
    integer = tqdit.quantize(model, recipe, calls=calls, out=ROOT / "flux")
    arguments = ENTRY.call(UNSEEN)
    output = convert(integer.solution, "reference")(**arguments, return_dict=False)[0]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    save_file({**tensors, "output": output}, ROOT / "expected.safetensors")


if __name__ == "__main__":
    main()
