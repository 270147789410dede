"""The published shapes by name."""

import pytest
import torch

from tqdit.architectures.building import empty_model
from tqdit.architectures.registry import check_supported
from tqdit.architectures.shapes import shape_config, shape_key, shape_name, shape_names, tokens, width
from tqdit.errors import InputError
from tqdit.sources.resolve import resolve


@pytest.mark.parametrize(
    ("name", "layers", "channels", "heads", "patch", "side"),
    [
        ("DiT-S/2", 12, 384, 6, 2, 32),
        ("DiT-B/4", 12, 768, 12, 4, 32),
        ("DiT-L/8", 24, 1024, 16, 8, 32),
        ("DiT-XL/2", 28, 1152, 16, 2, 32),
        ("DiT-XL/2@256", 28, 1152, 16, 2, 32),
        ("DiT-XL/2@512", 28, 1152, 16, 2, 64),
    ],
)
def test_published_sizes(name: str, layers: int, channels: int, heads: int, patch: int, side: int) -> None:
    config = shape_config(name)
    check_supported(config)
    assert (config["num_layers"], width(config), config["num_attention_heads"]) == (layers, channels, heads)
    assert (config["patch_size"], config["sample_size"]) == (patch, side)
    assert (config["in_channels"], config["out_channels"], config["num_embeds_ada_norm"]) == (4, 8, 1000)
    assert tokens(config) == (side // patch) ** 2


def test_xl_has_the_published_number_of_parameters() -> None:
    """675 M in the paper, with one embedder; diffusers has a copy in every block."""
    seen = {p: p.numel() for n, p in empty_model(shape_config("DiT-XL/2")).named_parameters() if ".emb." not in n}
    embedder = 256 * 1152 + 1152 + 1152 * 1152 + 1152 + 1001 * 1152
    assert (sum(seen.values()) + embedder) / 1e6 == pytest.approx(675, abs=1)


def test_a_shape_has_the_keys_of_a_real_config() -> None:
    real = {key for key in resolve("fashion-dit").config if key != "_diffusers_version"}
    assert set(shape_config("DiT-S/2")) == real


@pytest.mark.parametrize("name", shape_names())
def test_names_are_found_again(name: str) -> None:
    assert shape_name(shape_config(name)) == name
    assert shape_name(shape_config(f"{name}@256")) == name
    assert shape_name(shape_config(f"{name}@512")) == f"{name}@512"


def test_other_shapes_are_named_by_their_sizes() -> None:
    config = resolve("fashion-dit").config
    assert shape_name(config) == "DiT-6x192/2@32"
    assert shape_key(config) != shape_key({**config, "num_attention_heads": 6, "attention_head_dim": 32})
    assert shape_key({**config, "out_channels": None}) == shape_key({**config, "out_channels": 1})


@pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-S/3", "S/2", "", "DiT-S/2@1024", "DiT-S/2@", "DiT-S/02", "dit-s/2"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown (shape|image side).*known: .*(DiT-XL/2|@512)"):
        shape_config(name)


def test_on_the_meta_device_nothing_is_allocated() -> None:
    model = empty_model(shape_config("DiT-XL/2@512"))
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
