"""Situations with adapters: files that have more than lora_A and lora_B, and merging into integers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import WrongError, artifact, load, load_float, normal, output

import tqdit


def adapter(work: Path, **settings: Any) -> Path:
    """A LoRA of the float model as after training: whatever is trained has moved."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False, **settings)
    model = get_peft_model(load_float(work / "float"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.3)
    model.save_pretrained(work / "lora")
    return work / "lora"


def applied_or_refused(word: str = "", **settings: Any) -> Callable[[Path], str]:
    """The adapter does what it does on the float model, or one line names what it has."""

    def run(work: Path) -> str:
        path = artifact(work)
        lora = adapter(work, **settings)
        expected = output(PeftModel.from_pretrained(load_float(work / "float"), lora).eval())
        try:
            model = PeftModel.from_pretrained(load(path), lora).eval()
            found = output(model)
        except (tqdit.InputError, ValueError) as error:
            line = str(error)
            if "\n" in line or word not in line:
                raise WrongError(f"the refusal does not name '{word}' in one line: {line!r}") from None
            return f"refused: {line}"
        return normal(expected, found)

    return run


def merging(work: Path) -> str:
    model = get_peft_model(load(artifact(work)), LoraConfig(target_modules=["to_q"]))
    try:
        model.merge_and_unload()
    except (tqdit.InputError, ValueError) as error:
        line = str(error)
        if "\n" in line or "integer" not in line:
            raise WrongError(f"the refusal does not say why in one line: {line!r}") from None
        return f"refused: {line}"
    raise WrongError("accepted")


CASES: dict[str, Callable[[Path], str]] = {
    "a plain LoRA": applied_or_refused(),
    "a LoRA with its own biases": applied_or_refused("bias", bias="lora_only"),
    "a LoRA with all biases": applied_or_refused("bias", bias="all"),
    "a LoRA with modules_to_save": applied_or_refused("proj_out_2", modules_to_save=["proj_out_2"]),
    "merging a LoRA": merging,
}
