"""State dicts of other artifacts, and accelerate's offloading."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import WrongError, artifact, dit, folder, load, normal, output, quantized

import tqdit

MOVED = 0.95  # of the bytes of its state, at least


def other_state(work: Path) -> str:
    """The state of another artifact is taken whole, or refused and nothing changes."""
    a, b = dit(), dit()
    with torch.no_grad():
        for name, parameter in b.named_parameters():
            if "attn1.to_q.weight" in name:
                parameter.mul_(1.5)
        b.transformer_blocks[0].ff.net[2].weight.mul_(3)
    first, second = (quantized(work / f"q{n}", folder(work / f"f{n}", m)) for n, m in (("a", a), ("b", b)))
    model = load(first)
    before = output(model)
    try:
        model.load_state_dict(load(second).state_dict())
    except (tqdit.InputError, RuntimeError) as error:
        if "\n" in str(error):
            raise WrongError(f"a refusal of several lines: {error}") from None
        if not torch.equal(output(model), before):
            raise WrongError("refused, but the model has changed") from None
        return f"refused: {error}"
    model.save_pretrained(work / "saved")
    expected = output(load(second))
    return normal(torch.cat([expected, expected]), torch.cat([output(model), output(load(work / "saved"))]), 60.0)


def offloaded(**options: Any) -> Callable[[Path], str]:
    """Codes move away and come back: the same output."""

    def run(work: Path) -> str:
        import accelerate

        path = artifact(work)
        expected = output(load(path))
        if "offload_dir" in options:
            shutil.rmtree(work / "disk", ignore_errors=True)
            given = {"offload_dir": str(work / "disk")}
            model = accelerate.disk_offload(load(path), execution_device=torch.device("cpu"), **given)
        else:
            model = accelerate.cpu_offload(load(path), execution_device=torch.device("cpu"), **options)
        tensors = model.state_dict().values()  # what a model has of its own; tables that are computed stay
        moved = sum(t.nbytes for t in tensors if t.is_meta) / sum(t.nbytes for t in tensors)
        if moved < MOVED:
            raise WrongError(f"{100 * moved:.1f} % of its state moved away")
        return f"{100 * moved:.1f} % of its state moved away, output {normal(expected, output(model), 200.0)}"

    return run


CASES: dict[str, Callable[[Path], str]] = {
    "load_state_dict of another artifact": other_state,
    "accelerate's cpu_offload": offloaded(),
    "accelerate's cpu_offload with buffers": offloaded(offload_buffers=True),
    "accelerate's disk_offload": offloaded(offload_dir=True),
}
