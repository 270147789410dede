"""Remember at which sizes attention has run with codes of probabilities that are not the reference's.

Attention in one pass and attention in bf16 are closer to the true softmax or further from it by a stated bound.
A model's `quantization_report` names the sizes. They are those of all models in a process: a kernel does not know whose
call it is. The names of kernels that runs are recorded by do not change with them.
"""

from tqdit.backends.triton.layouts import BF16, FLASH, Config

KINDS = {FLASH: "in one pass over the keys for", BF16: "in bf16, of dequantized codes, for"}
_TAKEN: dict[int, dict[str, None]] = {kind: {} for kind in KINDS}


def note(config: Config, tokens: int, keys: int, head_dim: int) -> None:
    """Remember the sizes of a call if its configuration is of one of `KINDS`."""
    if config.hopper in KINDS:
        _TAKEN[config.hopper][f"{tokens} x {keys} x {head_dim}"] = None


def described() -> str:
    """Return what is to be added to the name of attention's kernel, with the sizes of calls in this process."""
    found = [f"; {KINDS[kind]} {', '.join(sizes)} (queries, keys, head_dim)" for kind, sizes in _TAKEN.items() if sizes]
    return "".join(found)
