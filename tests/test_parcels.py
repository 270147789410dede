"""Named tensors as one piece of memory."""

import pytest
import torch

from tqdit.system import parcels
from tqdit.system.parcels import copied

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_equal_and_on_the_cpu(device: str, monkeypatch) -> None:
    """Tensors of every kind that a batch of calibration leaves, over the end of the memory on the way."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(parcels, "STAGE", 1000)
    made = torch.Generator().manual_seed(0)
    tensors = {
        "rows": torch.randn(37, 12, generator=made),
        "strided": torch.randn(8, 9, 5, generator=made).transpose(0, 2),
        "groups": torch.randint(0, 10, (37,), generator=made),
        "codes": torch.randint(-128, 128, (3, 7), generator=made, dtype=torch.int8),
        "none": torch.empty(0, 4),
    }
    found = copied({name: tensor.to(device) for name, tensor in tensors.items()})
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].device.type == "cpu"
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


def test_a_parcel_travels_in_parts(monkeypatch) -> None:
    """What a GPU's parcel goes through, here on a CPU: whole parts and a last one."""
    monkeypatch.setattr(parcels, "STAGE", 64)
    for size in (0, 1, 64, 65, 1000):
        flat = torch.arange(size).to(torch.uint8)
        found = parcels.on_host(flat)
        assert torch.equal(found, flat)
        assert size == 0 or found.data_ptr() != flat.data_ptr()


def test_nothing_copied_is_nothing() -> None:
    assert copied({}) == {}
