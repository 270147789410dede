"""Fetch models from the Hugging Face Hub: all that a pipeline is made of, but never a pickle."""

import re
from pathlib import Path

from tqdit.errors import InputError
from tqdit.sources.components import PICKLES

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
OF_OTHERS = (".onnx", ".onnx_data", ".gguf", ".ot", ".pb", ".tflite")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
LEFT_OUT = tuple(f"*{suffix}" for suffix in (*PICKLES, *OF_OTHERS, *PICTURES))  # all else may be part of the pipeline


def is_id(model: str) -> bool:
    """Say whether a string has the form owner/name."""
    return ID.fullmatch(model) is not None


def fetched(model: str) -> Path:
    """Return the folder of a model's files, which are downloaded unless the Hub's cache has them.

    With HF_HUB_OFFLINE set, only the cache is used. Raises `InputError` that names the model.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, ignore_patterns=list(LEFT_OUT)))
    except Exception as error:  # errors of the library and of its connections share no class
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"unknown model '{model}': no such folder here, and not to be had from the Hugging Face Hub: {reason}"
        ) from None
    if not any(folder.rglob("*.safetensors")):
        raise InputError(f"'{model}' on the Hugging Face Hub has no safetensors weights; pickled ones are not loaded")
    return folder
