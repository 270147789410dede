"""From latents to pixels and pictures."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tqdit.errors import InputError
from tqdit.imaging.generate import check_decodable, decoder, sample_batches, save_grid, to_pixels
from tqdit.sampling.guidance import Sampling


@pytest.mark.parametrize("channels", [1, 3])
def test_output_of_a_pixel_model_is_the_image(channels: int) -> None:
    latents = torch.linspace(-2, 2, 2 * channels * 4).reshape(2, channels, 2, 2)
    assert torch.equal(to_pixels(latents, None), latents.clamp(-1, 1))


@pytest.mark.parametrize("channels", [2, 4])
def test_latents_need_a_vae(channels: int) -> None:
    with pytest.raises(InputError, match=f"{channels} channels.*pipeline folder.*vae"):
        check_decodable(channels, None)
    with pytest.raises(InputError, match="vae"):
        to_pixels(torch.zeros(1, channels, 2, 2), None)


def test_vae_needs_safetensors(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(InputError, match="safetensors"):
        check_decodable(4, tmp_path)
    with pytest.raises(InputError, match="latents of 4 channels, the model's have 16"):
        check_decodable(16, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    check_decodable(4, tmp_path)


def test_decoder_is_the_vae_image_by_image(tmp_path) -> None:
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, scaling_factor=0.5).eval()
    vae.save_pretrained(tmp_path)
    latents = torch.randn(3, 4, 4, 4)
    with torch.inference_mode():
        expected = vae.decode(latents / 0.5).sample.clamp(-1, 1)
    assert torch.allclose(decoder(tmp_path, torch.device("cpu"))(latents), expected, atol=1e-5)
    assert torch.equal(to_pixels(latents[:1], tmp_path), decoder(tmp_path, torch.device("cpu"))(latents[:1]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_is_a_png(tmp_path, channels: int, mode: str) -> None:
    save_grid(torch.zeros(3, channels, 4, 4), tmp_path / "a.png", columns=2)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode) == ((16, 16), mode)


@pytest.fixture
def decoder_folder(tmp_path):
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block = 1000000"),
        ({"layers_per_block": 2}, "missing keys"),
        ({"block_out_channels": [10**9]}, "block_out_channels"),
        ({"block_out_channels": "x"}, "block_out_channels"),
        ({"out_channels": None}, "no decoder that diffusers can load"),
    ],
)
def test_a_decoder_whose_config_is_not_that_of_its_weights(decoder_folder, settings: dict, message: str) -> None:
    config = json.loads((decoder_folder / "config.json").read_text())
    (decoder_folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InputError, match=message) as error:
        decoder(decoder_folder, torch.device("cpu"))
    assert str(decoder_folder) in str(error.value)


def test_states_that_are_no_numbers_are_no_images(model, scheduler_config) -> None:
    with pytest.raises(InputError, match="NaN or Inf in 2 of 2 images, first in image 3; check the guidance"):
        list(sample_batches(model, scheduler_config, {3: 1, 4: 2}, Sampling("ddim", 2, 1e38), 0, [range(3, 5)]))
