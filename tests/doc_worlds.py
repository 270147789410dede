"""Make tiny models that stand in for those a page names, when its code runs.

Every model here is tiny and has random weights; a calibration is as small as its settings allow. Files have the names
that the pages give, in the present folder.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, FluxPipeline
from published_dit import random_dit, random_sit

import tqdit
from howtos import ROOT
from tiny_called import Pipeline, decoder, flux, write_flux
from tiny_dit import SCHEDULER, build_dit, write_pipeline
from tiny_pipelines import TOKENS, WIDTH, write_pixart
from tqdit import recipe
from tqdit.architectures import dit_checkpoint
from tqdit.sources import resolve

SMALL = {
    "groups": 2, "samples": 1, "steps": 4, "rounds": 0, "candidates": 4, "rows": 32, "queries": 32, "hessian": "none",
}  # fmt: skip
BUNDLED_INDEX = resolve.BUNDLED["fashion-dit"] / "model_index.json"
Names = dict[str, Any]


def small_recipes(patch: pytest.MonkeyPatch) -> None:
    """Make every recipe as small as `SMALL`, whatever settings a page gives.

    The recipe of a comparison's held-out states, which alone says how many trajectories there are, is left as it is.
    """
    original = recipe.Recipe.__init__

    def init(self: Any, /, preset: str = "plus", bits: str = "w8a8", **settings: Any) -> None:
        original(self, preset, bits, **settings | ({} if settings.get("trajectories") else SMALL))

    patch.setattr(recipe.Recipe, "__init__", init)


def fashion(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`fashion-dit`: a DiT of one block for images of the size and the classes of the bundled one."""
    root = write_pipeline(folder / "bundled", build_dit(num_layers=1, sample_size=32, patch_size=8))
    shutil.copy(BUNDLED_INDEX, root)
    patch.setitem(resolve.BUNDLED, "fashion-dit", root)
    return {}


def quantized_fashion(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """The artifact `w8a8` of the bundled model, which a page takes as made."""
    tqdit.quantize("fashion-dit", folder / "w8a8", tqdit.Recipe())
    return {}


def two_artifacts(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """The artifacts `w8a8` and `w4a8` of the bundled model; and `tqdit`, which a page takes as imported."""
    for bits in ("w8a8", "w4a8"):
        tqdit.quantize("fashion-dit", folder / bits, tqdit.Recipe("plus", bits))
    return {"tqdit": tqdit}


def recipe_file(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`recipe.toml`, as docs/commands.md says how to make it."""
    (folder / "recipe.toml").write_text(tqdit.Recipe("plus", "w6a6").to_toml())
    return {}


def dit_pipeline(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`DiT-XL-2-256`: a DiT of one block for latents of 4 channels and 1000 classes, with a decoder."""
    model = build_dit(num_layers=1, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    DiTPipeline(model, _vae(), scheduler).save_pretrained(folder / "DiT-XL-2-256")
    return {}


def checkpoints(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """Checkpoints of a DiT and a SiT of two narrow blocks, a VAE, class names, and the folder `owner/dit`."""
    patch.setattr(dit_checkpoint, "HEADS", {32: 2, **dit_checkpoint.HEADS})  # a width of 32 counts as published
    torch.save(random_dit(classes=1000).state_dict(), folder / "DiT-XL-2-256x256.pt")
    torch.save(random_sit(classes=1000).state_dict(), folder / "SiT-XL-2-256x256.pt")
    _vae().save_pretrained(folder / "vae")
    (folder / "names.json").write_text(json.dumps({str(i): f"class {i}" for i in range(1000)}))
    build_dit(in_channels=4, out_channels=8).save_pretrained(folder / "owner" / "dit")
    return {}


def pixart(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`PixArt-Sigma`: one narrow block; and `pipe`, of which a page calls the text encoder alone."""
    write_pixart(folder / "PixArt-Sigma")

    def encode_prompt(prompts: list[str]) -> tuple[torch.Tensor, ...]:
        count = len(prompts)
        mask = torch.ones(count, TOKENS, dtype=torch.int64)
        negative = torch.randn(1, TOKENS, WIDTH).expand(count, -1, -1)
        return torch.randn(count, TOKENS, WIDTH), mask, negative, mask.clone()

    return {"pipe": SimpleNamespace(encode_prompt=encode_prompt)}


def flux_in_memory(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`flux`: a stub of a pipeline that calls a FLUX transformer of two narrow blocks."""

    class Flux(Pipeline):
        def __call__(self, prompt: str, num_inference_steps: int) -> torch.Tensor:
            return super().__call__(len(prompt), 2)

    return {"flux": Flux(transformer=flux(), scheduler=SimpleNamespace())}


def z_image(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`Tongyi-MAI/Z-Image-Turbo`: a narrow FLUX pipeline, which draws images of 16 x 16 pixels; and `prompts.txt`.

    A GPU is the CPU, and the class `ZImageTransformer2DModel` is FLUX's.
    """
    (folder / "Tongyi-MAI").mkdir()
    write_flux(folder / "Tongyi-MAI" / "Z-Image-Turbo", decoder())
    (folder / "prompts.txt").write_text("a cat\n")
    call = FluxPipeline.__call__
    patch.setattr(FluxPipeline, "__call__", lambda self, *a, **k: call(self, *a, height=16, width=16, **k))
    patch.setattr(DiffusionPipeline, "to", lambda self, device: self)
    patch.setattr(diffusers, "ZImageTransformer2DModel", diffusers.FluxTransformer2DModel)
    return {}


def _vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, sample_size=8).eval()


MADE: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Names], ...]] = {
    "README.md": (fashion, dit_pipeline, flux_in_memory),
    "docs/quickstart.md": (fashion,),
    "docs/commands.md": (fashion, recipe_file),
    "docs/howto/checkpoint.md": (checkpoints, pixart),
    "docs/howto/diffusers.md": (dit_pipeline, flux_in_memory),
    "docs/howto/cpu-server.md": (fashion,),
    "docs/models.md": (z_image,),
    "docs/artifact-format.md": (fashion, quantized_fashion),
    "docs/report.md": (fashion, two_artifacts),
}  # pages whose code runs -> what is made before, in order; the two how-tos that define modules need nothing
WORLDS = {page: makers for page, makers in MADE.items() if (ROOT / page).is_file()}
