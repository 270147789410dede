"""Sizes of a float model: of the file as it is, in bf16 and in fp32."""

from pathlib import Path

import pytest
import torch
from published_dit import random_dit
from safetensors.torch import load_file, save_file

from tqdit.sources.resolve import load_float, resolve
from tqdit.sources.sizes import float_sizes
from tqdit.system.files import WEIGHTS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_folder(own_pipeline: Path, dtype: torch.dtype) -> None:
    file = own_pipeline / "transformer" / WEIGHTS
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    source = resolve(own_pipeline)
    model = load_float(source)
    count = sum(parameter.numel() for parameter in model.parameters())
    found = float_sizes(source, model)
    assert (found.float32_bytes, found.bfloat16_bytes) == (4 * count, 2 * count)
    assert (found.file_bytes, found.file_dtype) == (dtype.itemsize * count, str(dtype).removeprefix("torch."))


def test_only_the_weights_of_a_training_checkpoint_count(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in random_dit(channels=1).state_dict().items()}
    torch.save({"ema": state, "model": state, "opt": {}}, tmp_path / "dit.pt")
    source = resolve(tmp_path / "dit.pt", 2)
    found = float_sizes(source, load_float(source))
    assert found.file_dtype == "float16"
    assert found.file_bytes == 2 * sum(tensor.numel() for tensor in state.values())


@pytest.mark.filterwarnings("ignore::tqdit.errors.AssumptionWarning")
def test_a_checkpoint_is_unpickled_once(tmp_path: Path, monkeypatch) -> None:
    torch.save(random_dit().state_dict(), tmp_path / "dit.pt")
    unpickled: list[Path] = []
    load = torch.load

    def watched(path: Path, **options: object) -> object:
        unpickled.append(path)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", watched)
    source = resolve(tmp_path / "dit.pt", 2)
    first = load_float(source)
    first.proj_out_2.bias.zero_()
    assert load_float(source).proj_out_2.bias.any()  # the file's, which no model of it shares
    float_sizes(source, first)
    assert unpickled == [tmp_path / "dit.pt"]
