"""Whatever the caller's process has set: dtypes, autograd, autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tiny import WrongError, artifact, folder, load, load_float, normal, output, quantized


class default_dtype(AbstractContextManager[None]):  # noqa: N801 - used as torch's own context managers are
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


WORLDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def quantizing(name: str) -> Callable[[Path], str]:
    """The artifact has the same bytes, and the global random state is as it was."""

    def run(work: Path) -> str:
        source = folder(work / "float")
        expected = contents(quantized(work / "plain", source))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with WORLDS[name]():
            found = contents(quantized(work / "q", source))
        if not torch.equal(torch.get_rng_state(), before):
            raise WrongError("the global random state has changed")
        if found != expected:
            raise WrongError("other bytes")
        return "the same bytes"

    return run


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.suffix in (".safetensors", ".json")}


def calling(dtype: torch.dtype, backend: str, lora: bool = False) -> Callable[[Path], str]:
    """Integers are as exact under autocast as without."""

    def run(work: Path) -> str:
        path = artifact(work)
        model = load(path, backend)
        if lora:
            model = with_lora(model, work)
        expected = output(model)
        with torch.autocast("cpu", dtype=dtype):
            found = output(model)
        return normal(expected, found, 60.0)

    return run


def with_lora(model: Any, work: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False)
    get_peft_model(load_float(work / "float"), config).save_pretrained(work / "lora")
    return PeftModel.from_pretrained(model, work / "lora").eval()


CASES: dict[str, Callable[[Path], str]] = {
    **{f"quantize under {name}": quantizing(name) for name in WORLDS},
    **{f"a call under {str(dtype).removeprefix('torch.')} autocast, {backend}": calling(dtype, backend)
       for backend in ("cpu", "reference") for dtype in (torch.float16, torch.bfloat16)},
    "a call with LoRA under float16 autocast": calling(torch.float16, "cpu", lora=True),
}  # fmt: skip
