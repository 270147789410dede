"""Bytes of the weights on the device, for each GPU backend: no GPU is needed to count them.

TRITON_INTERPRET=1 python bench/gpu_weights.py --json bench/results/gpu-weights.json

Counts every tensor of a converted random DiT-XL/2 once: codes, scales, biases, sums of codes, tables of activation
parameters, embeddings. fp32: the parameters of the float model whose blocks share one embedder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from tqdit.architectures.building import empty_model, share_embedder
from tqdit.architectures.shapes import shape_config
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.random_solution import random_solution
from tqdit.system.environment import environment
from tqdit.system.files import write_text

SHAPE = "DiT-XL/2"
BITS = ("w8a8", "w6a6", "w4a8")
BACKENDS = ("triton", "triton-packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    config = shape_config(SHAPE)
    model = empty_model(config)
    share_embedder(model)
    whole = sum(4 * p.numel() for p in model.parameters())
    whole += sum(4 * b.numel() for b in model.buffers())
    rows: list[dict[str, Any]] = []
    for bits in BITS:
        solution = random_solution(config, Recipe("plus", bits))
        for backend in BACKENDS:
            held = bytes_of(convert(solution, backend))
            rows.append({"bits": bits, "backend": backend, "bytes": held, "of_fp32": held / whole})
            print(rows[-1], flush=True)
    result = {"environment": environment(), "shape": SHAPE, "fp32_bytes": whole, "rows": rows}
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def bytes_of(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(tensors.values())


if __name__ == "__main__":
    main()
