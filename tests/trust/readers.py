"""What becomes of an artifact that may be damaged: read as the command line would, drawn from, and judged."""

import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from corruption import Damage, files_of

from tqdit import workflow
from tqdit.errors import InputError
from tqdit.sampling.guidance import Sampling
from tqdit.system.files import MANIFEST, model_folder

SAMPLING = Sampling("ddim", 2, 1.5)
LEAST_SQNR = 30.0  # decibels between backends: what is left of one rounding that falls otherwise
NOT_READ = "not read"
GOOD = ("refused", "same", "legal", "diffusers", "hang in diffusers")


def pixels(folder: Path, backend: str = "auto") -> torch.Tensor:
    """Two images, of a class by name where there are names: scheduler, names, decoder and model all take part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return workflow.sample(folder, ["1", "3"], 2, SAMPLING, backend=backend)


def from_pretrained(folder: Path, _: str = "auto") -> torch.Tensor:
    """A call of the transformer as diffusers loads it, which reads config and weights."""
    from diffusers import DiTTransformer2DModel

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = DiTTransformer2DModel.from_pretrained(model_folder(folder))
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return model(x, timestep=torch.tensor([900, 20]), class_labels=torch.tensor([1, 3])).sample


READERS: dict[str, Callable[..., torch.Tensor]] = {"tqdit": pixels, "diffusers": from_pretrained}


def outcome(damage: Damage, root: Path, expected: dict[str, torch.Tensor], reader: str = "tqdit") -> tuple[str, str]:
    """One of `GOOD` or what went wrong, and a sentence. `expected`: what `reader` gives of each undamaged artifact.

    refused: one printable line that names the folder or a file of it. same: the same output. legal: another output of
    an artifact whose hashes are right, the same as the reference backend gives. Of diffusers' `from_pretrained`, which
    reads files before we do, a refusal need not name one, and "diffusers" is an exception that is not ours.
    """
    beside = model_folder(root / damage.kind) not in (root / damage.kind / damage.file).parents
    if reader == "diffusers" and (beside or Path(damage.file).name == MANIFEST):
        return NOT_READ, ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / damage.kind
        shutil.copytree(root / damage.kind, folder)
        damage.change(folder)
        try:
            found = READERS[reader](folder)
        except InputError as error:
            return _judged(str(error), folder, damage) if reader == "tqdit" else ("refused", str(error))
        except Exception as error:
            ours = reader == "tqdit" or "tqdit" in traceback.extract_tb(error.__traceback__)[-1].filename
            return "exception" if ours else "diffusers", f"{type(error).__name__}: {str(error)[:200]}"
        if torch.equal(found, expected[damage.kind]):
            return "same", ""
        if not damage.forged:
            return "other output", ""
        return _compared(found, folder) if reader == "tqdit" else ("legal", "")


def _judged(message: str, folder: Path, damage: Damage) -> tuple[str, str]:
    names = {str(folder), *(Path(file).name for file in [*files_of(folder), damage.file])}
    if not message.isprintable():
        return "message of several lines", ascii(message)
    if not any(name in message for name in names):
        return "message without a file", message
    return "refused", message


def _compared(found: torch.Tensor, folder: Path) -> tuple[str, str]:
    """Whether the compiled kernels computed what the reference does: reading past a tensor's end gives anything."""
    reference = pixels(folder, "reference")
    if not torch.isfinite(reference).all():
        return "legal", "not finite"
    error = (found - reference).square().sum()
    sqnr = 10 * torch.log10(reference.square().sum() / error.clamp(min=1e-12))
    return ("legal", "") if sqnr >= LEAST_SQNR else ("other than the reference", f"{float(sqnr):.1f} dB")
