"""Official checkpoints: the loaded model is the published one, and every way a file can be wrong has one error."""

import argparse
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from published_dit import PublishedDiT, position_table, random_dit, sinusoids
from safetensors.torch import save_file

from tqdit import workflow
from tqdit.architectures import dit_checkpoint
from tqdit.architectures.registry import FREQUENCY_SHIFT
from tqdit.errors import AssumptionWarning, InputError
from tqdit.sampling.guidance import Sampling
from tqdit.sources import checkpoints
from tqdit.sources.resolve import load_float, resolve, weights_hash

State = dict[str, torch.Tensor]
WIDTH = "x_embedder.proj.weight"


@pytest.fixture(autouse=True)
def _tiny_width_is_published(monkeypatch) -> None:
    """So that commands take tiny checkpoints, which have no place for --num-heads."""
    monkeypatch.setattr(dit_checkpoint, "HEADS", {32: 2, 48: 3, **dit_checkpoint.HEADS})


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny checkpoint after `change` of its weights."""

    def write(change: Callable[[State], object] = lambda state: None, **sizes: object) -> Path:
        state = random_dit(**sizes).state_dict()
        change(state)
        torch.save(state, tmp_path / "official.pt")
        return tmp_path / "official.pt"

    return write


def inputs(model: PublishedDiT, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y, the null class and both ends of time among them."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, model.x_embedder.proj.in_channels, side, side, generator=generator)
    null = model.y_embedder.embedding_table.num_embeddings - 1
    return x, torch.tensor([0, 1, 500, 999]), torch.tensor([0, 1, null - 1, null])


@torch.inference_mode()
def same(expected: PublishedDiT, found: torch.nn.Module, side: int = 8, tolerance: float = 1e-5) -> bool:
    x, t, y = inputs(expected, side)
    return torch.allclose(expected(x, t, y), found(x, timestep=t, class_labels=y).sample, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"learned_sigma": False},
        {"patch": 4, "side": 16, "channels": 3},
        {"patch": 8, "side": 16, "channels": 1, "classes": 1, "depth": 1},
        {"width": 48, "heads": 3, "classes": 7, "depth": 3, "side": 12},
    ],
)
def test_a_loaded_model_is_the_published_one(file, sizes: dict) -> None:
    source = resolve(file(**sizes))
    model = load_float(source)
    assert same(random_dit(**sizes), model, sizes.get("side", 8))
    assert source.name == "official"
    assert source.config["num_embeds_ada_norm"] == sizes.get("classes", 10)
    assert source.config["sample_size"] == sizes.get("side", 8)
    assert source.scheduler is not None
    assert source.scheduler["beta_end"] == 0.02
    assert not model.training
    assert {(p.dtype, p.requires_grad, p.is_meta) for p in model.parameters()} == {(torch.float32, False, False)}


def test_frequencies_are_the_published_ones(file) -> None:
    model = load_float(resolve(file()))
    t = torch.tensor([0, 17, 999])
    for block in model.transformer_blocks:
        assert torch.allclose(block.norm1.emb.time_proj(t), sinusoids(t), atol=1e-5)
    model.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 1
    assert not same(random_dit(), model, tolerance=0.1), "diffusers' own frequencies are another model"


def test_blocks_share_one_embedder(file) -> None:
    first, second = load_float(resolve(file())).transformer_blocks
    assert first.norm1.emb is second.norm1.emb


def test_published_position_table_is_that_of_diffusers(file) -> None:
    model = load_float(resolve(file(side=12)))
    assert torch.allclose(model.pos_embed.pos_embed, position_table(6, 32), atol=1e-6)


@pytest.mark.parametrize(("kept", "used"), [(("ema", "model"), "ema"), (("model",), "model"), (("ema",), "ema")])
def test_a_training_checkpoint(tmp_path, kept: tuple[str, ...], used: str) -> None:
    models = {"ema": random_dit(1), "model": random_dit(2)}
    content = {key: models[key].state_dict() for key in kept}
    content |= {"opt": {"state": {0: {"step": torch.tensor(3)}}}, "args": argparse.Namespace(model="tiny", lr=1e-4)}
    torch.save(content, tmp_path / "0050000.pt")
    source = resolve(tmp_path / "0050000.pt")
    assert source.weights == used
    assert same(models[used], load_float(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_loaded_as_fp32(tmp_path, dtype: torch.dtype) -> None:
    model = random_dit()
    torch.save({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, tmp_path / "a.pt")
    loaded = load_float(resolve(tmp_path / "a.pt"))
    rounded = random_dit()
    for name, parameter in rounded.named_parameters():
        if name != "pos_embed":  # computed, not read
            parameter.data = parameter.data.to(dtype).float()
    assert same(rounded, loaded)


def test_the_older_file_format(tmp_path) -> None:
    torch.save(random_dit().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(random_dit(), load_float(resolve(str(tmp_path / "old.pth"))))


def test_a_model_does_not_depend_on_its_file(file) -> None:
    path = file()
    model = load_float(resolve(path))
    with path.open("r+b") as stream:  # the very file, not another of its name
        stream.write(bytes(path.stat().st_size))
    assert same(random_dit(), model)


def test_quantized_the_frequencies_stay_published(file, tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(bits="w8a8", rounds=0, hessian=False)
    path = file(channels=1)
    workflow.quantize(path, tmp_path / "w8a8", recipe)
    assert resolve(tmp_path / "w8a8").config[FREQUENCY_SHIFT] == 0
    integer = workflow.load(tmp_path / "w8a8", backend="reference")
    check_embedding(integer)
    check_embedding(DiTTransformer2DModel.from_pretrained(tmp_path / "w8a8"))
    integer.save_pretrained(tmp_path / "again")
    check_embedding(workflow.load(tmp_path / "again"))


def check_embedding(integer: torch.nn.Module) -> None:
    """An integer model of `random_dit(channels=1)` embeds timesteps as published."""
    assert integer.config[FREQUENCY_SHIFT] == 0
    t, y = torch.tensor([3, 999]), torch.tensor([1, 10])
    with torch.inference_mode():
        for embedder in integer.conditioning.embedders:
            assert embedder.time_proj.projection.downscale_freq_shift == 0
            assert torch.allclose(embedder.time_proj(t), sinusoids(t), atol=1e-5)
            expected = random_dit(channels=1).embedding(t, y)
            found = embedder(t, y, hidden_dtype=torch.float32)
            assert (found - expected).norm() < 0.02 * expected.norm(), "weights of 8 bits"


def test_a_folder_of_images_knows_its_checkpoint(file, tmp_path) -> None:
    def draw(model: Path, num: int) -> int:
        wanted = workflow.images_of(model, [], num, Sampling("ddim", 2, 1.0))
        return workflow.sample_folder(wanted, tmp_path / "images")

    path = file(channels=1)
    assert draw(path, 1) == 1
    assert draw(path.rename(tmp_path / "renamed.pt"), 3) == 2
    with pytest.raises(InputError, match="images of another run: model_sha256"):
        draw(file(put_value("final_layer.linear.bias", 1.0), channels=1), 3)


def test_models_of_other_frequencies_have_another_hash(file) -> None:
    model = load_float(resolve(file()))
    before = weights_hash(model)
    model.register_to_config(**{FREQUENCY_SHIFT: 1})
    assert weights_hash(model) != before


def put(name: str, tensor: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: tensor})


def put_value(name: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_value("blocks.1.mlp.fc2.bias", float("nan")), "tensor 'blocks.1.mlp.fc2.bias' is nan at index ["),
        (put_value("t_embedder.mlp.2.weight", float("inf")), "tensor 't_embedder.mlp.2.weight' is inf at index ["),
        (put_value("pos_embed", float("nan")), "tensor 'pos_embed' is nan at index ["),
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "weights lack tensor 'blocks.1.attn.qkv.bias'"),
        (lambda s: s.pop("pos_embed"), "it lacks tensor 'pos_embed'"),
        (lambda s: s.pop("blocks.0.attn.qkv.weight"), "it lacks tensor 'blocks.0.attn.qkv.weight'"),
        (put("stranger", torch.zeros(1)), "unexpected tensor 'stranger'"),
        (put("blocks.07.attn.qkv.weight", torch.zeros(96, 32)), "weights lack tensor 'blocks.2.attn.qkv.weight'"),
        (put("blocks.0.attn.qkv.weight", torch.zeros(95, 32)), "has shape (95, 32), the other tensors need (96, 32)"),
        (put("final_layer.linear.weight", torch.zeros(31, 32)), "'final_layer.linear.weight' has 31 rows"),
        (put(WIDTH, torch.zeros(32, 4, 2)), f"'{WIDTH}' has shape (32, 4, 2)"),
        (put(WIDTH, torch.zeros(32, 4, 2, 3)), "patches of 2 x 3"),
        (put(WIDTH, torch.zeros(32, 0, 2, 2)), f"'{WIDTH}' has shape (32, 0, 2, 2)"),
        (put("pos_embed", torch.zeros(1, 15, 32)), "'pos_embed' has 15 tokens, which are no square"),
        (put("pos_embed", torch.zeros(1, 16, 32)), "'pos_embed' is not the sine-cosine table"),
        (put("pos_embed", torch.zeros(2, 16, 32)), "'pos_embed' has shape (2, 16, 32)"),
        (put_value("pos_embed", 0.99), "'pos_embed' is not the sine-cosine table of DiT: it differs by 0.0"),
        (put("y_embedder.embedding_table.weight", torch.zeros(1, 32)), "num_embeds_ada_norm = 0"),
        (put("blocks.0.mlp.fc1.bias", torch.zeros(128, dtype=torch.int64)), "'blocks.0.mlp.fc1.bias' is no tensor of"),
        (put("epoch", 3), "'epoch' is no tensor of floats"),
    ],
)
def test_a_bad_tensor_is_named(file, change: Callable[[State], None], message: str) -> None:
    path = file(change)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        load_float(resolve(path))


def test_a_width_that_is_not_published(tmp_path) -> None:
    path = tmp_path / "a.pt"
    torch.save(random_dit(width=40, heads=5).state_dict(), path)
    with pytest.raises(InputError, match=r"a\.pt: .*heads is unknown for width 40.*num_heads"):
        resolve(path)
    assert same(random_dit(width=40, heads=5), load_float(resolve(path, num_heads=5)))
    for wrong in (0, 3, -5):
        with pytest.raises(InputError, match=f"num_heads {wrong} does not divide the width 40"):
            resolve(path, num_heads=wrong)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_widths(width: int, heads: int) -> None:
    assert dit_checkpoint.HEADS[width] == heads


@pytest.mark.parametrize("size", [0, 10, 2000, 60_000])
def test_a_truncated_file(file, size: int) -> None:
    path = file()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"official\.pt is truncated, damaged or no file of torch\.save"):
        resolve(path)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("place", ["ema", "args"])
def test_a_pickle_is_never_run(tmp_path, monkeypatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": random_dit().state_dict(), place: Malicious()}, "bad.pt")
    with pytest.raises(InputError, match=r"bad\.pt holds a Python object, \S+mkdir, which is never unpickled"):
        resolve("bad.pt")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"opt": {}}, {}, {1: torch.zeros(2)}])
def test_other_contents(tmp_path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt"):
        resolve(tmp_path / "a.pt")


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.pt is missing"):
        resolve(tmp_path / "none.pt")


def test_heads_are_for_checkpoints(pipeline) -> None:
    with pytest.raises(InputError, match="a number of heads is for a checkpoint file"):
        resolve(pipeline, num_heads=2)


def test_a_folder_may_have_the_name_of_a_file(pipeline, tmp_path) -> None:
    (tmp_path / "model.pt").symlink_to(pipeline)
    assert resolve(tmp_path / "model.pt").checkpoint is None


def test_what_is_read_names_the_set_of_weights(file) -> None:
    assert checkpoints.read(file()).weights == ""


# What a training's own arguments say ------------------------------------------------------------------------------


def trained(file: Callable[..., Path], **arguments: object) -> Path:
    """A training checkpoint of the tiny model, 10 classes and a null row, with its arguments."""
    path = file()
    tensors = torch.load(path)
    torch.save({"model": tensors, "ema": tensors, "opt": {}, "args": argparse.Namespace(**arguments)}, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 11}, "without a null class .*11 rows"),
        ({"class_dropout_prob": 0.0}, "without a null class .*11 rows"),
        ({"num_classes": 11, "class_dropout_prob": 0}, "without a null class"),
        ({"num_classes": 10, "class_dropout_prob": 0}, "11 rows.*num_classes 10.*which is 10 rows"),
        ({"num_classes": 7}, "11 rows.*num_classes 7"),
        ({"num_classes": 12}, "11 rows.*num_classes 12"),
        ({"num_classes": "ten"}, "num_classes 'ten'"),
        ({"learn_sigma": False}, "learn_sigma False.*makes 8 channels"),
        ({"image_size": 100}, "image_size 100.*sides of 8; an image's side is a multiple"),
        ({"image_size": 4}, "image_size 4.*sides of 8"),
        ({"image_size": 0}, "image_size 0.*sides of 8"),
        ({"model": "DiT-S/2"}, "model DiT-S/2, which has layers 12; its tensors have 2"),
        ({"prediction": "v"}, "prediction 'v'; supported of a checkpoint is 'epsilon'"),
        ({"noise_schedule": "cosine"}, "noise_schedule 'cosine'"),
        ({"diffusion_steps": 4000}, "diffusion_steps 4000"),
        ({"predict_xstart": True}, "predict_xstart True"),
    ],
)
def test_an_argument_that_is_not_dits_or_not_the_tensors(file, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=rf"official\.pt: .*{message}"):
        resolve(
            trained(file, **{"num_classes": 10, **arguments} if "class_dropout_prob" not in arguments else arguments)
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 10, "model": "my-DiT"},
        {"class_dropout_prob": 0.1},
        {"num_classes": 10, "image_size": 64, "learn_sigma": True, "class_dropout_prob": 0.1},
        {"num_classes": 10, "image_size": 8, "prediction": "noise", "noise_schedule": "linear"},
        *({"num_classes": 10, "image_size": 8 * factor} for factor in (4, 16, 32)),
        {"num_classes": 10, "path_type": None, "predict_xstart": False, "loss_weight": "min_snr"},
    ],
)
def test_arguments_that_agree(file, arguments: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        assert resolve(trained(file, **arguments)).config["num_embeds_ada_norm"] == 10


def test_where_arguments_say_the_classes_nothing_is_assumed(file) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        assert resolve(trained(file, num_classes=10)).config["num_embeds_ada_norm"] == 10


def test_where_nothing_says_the_classes_a_line_does(file) -> None:
    with pytest.warns(AssumptionWarning, match="the last of the 11 rows is taken for the null class"):
        assert resolve(file()).config["num_embeds_ada_norm"] == 10


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_wrapped_model(file, prefix: str) -> None:
    path = file()
    expected = weights_hash(load_float(resolve(path)))
    torch.save({f"{prefix}{name}": tensor for name, tensor in torch.load(path).items()}, path)
    assert weights_hash(load_float(resolve(path))) == expected


def test_a_checkpoint_in_safetensors(file) -> None:
    path = file()
    save_file(torch.load(path), path.with_suffix(".safetensors"))
    assert weights_hash(load_float(resolve(path.with_suffix(".safetensors")))) == weights_hash(
        load_float(resolve(path))
    )


def share_one_memory(state: State) -> None:
    """Every tensor becomes a view of the same values."""
    memory = torch.randn(max(tensor.numel() for tensor in state.values()))
    for name, tensor in state.items():
        state[name] = memory[: tensor.numel()].view(tensor.shape)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({WIDTH: torch.zeros(1).expand(2**20, 4, 2, 2)}), f"'{WIDTH}' repeats fewer values"),
        (
            lambda s: s.update({f"blocks.{i}.attn.qkv.weight": s["pos_embed"] for i in range(2, 20_000)}),
            r"weights lack tensor 'blocks\.2\.",
        ),
        (share_one_memory, "its tensors claim .* bytes, the file has"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 1)}), "'pos_embed' has 1 channels, expected 32"),
        (lambda s: s.update({WIDTH: s[WIDTH].double() * 1e39}), r"is .* at index .*too large for fp32"),
    ],
)
def test_a_file_that_claims_more_than_it_has_is_refused_before_anything_is_built(file, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_float(resolve(file(change)))


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt is not a regular file"):
        resolve(tmp_path / "x.pt")
