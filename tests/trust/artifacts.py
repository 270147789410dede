"""Small undamaged artifacts to damage: of the golden ones, a pipeline with a decoder, a plain folder, one in shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tqdit.artifact import folder as artifact

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "format-2"
KINDS = ("pipeline", "plain", "sharded")


def make_all(root: Path) -> None:
    """One folder per kind under `root`."""
    makers: dict[str, Callable[[Path], None]] = {"pipeline": _pipeline, "plain": _plain, "sharded": _sharded}
    for kind in KINDS:
        makers[kind](root / kind)


def _pipeline(folder: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.copytree(GOLDEN / "pipeline", folder)
    torch.manual_seed(0)
    AutoencoderKL(norm_num_groups=2, block_out_channels=(4,), latent_channels=1).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    artifact.seal(folder)


def _plain(folder: Path) -> None:
    shutil.copytree(GOLDEN / "plain" / "scheduler", folder / "scheduler")
    (folder / "id2label.json").write_text(json.dumps({str(i): f"class {i}" for i in range(10)}))
    artifact.write(artifact.read(GOLDEN / "plain"), folder)


def _sharded(folder: Path) -> None:
    shutil.copytree(GOLDEN / "plain", folder)
