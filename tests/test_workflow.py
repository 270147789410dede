"""The stages end to end on a tiny pipeline folder."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tqdit
from tqdit import quantizing, workflow
from tqdit.architectures.registry import config_of
from tqdit.artifact import folder as artifact
from tqdit.calibration import store, trajectories
from tqdit.errors import InputError, RepairWarning
from tqdit.plan import sites
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.summary import Summary
from tqdit.spec import Role
from tqdit.system import distributed, files
from tqdit.system.files import write_bytes
from tqdit.system.locks import holding
from tqdit.system.swap import beside
from tqdit.system.world import World

FAST = Sampling("ddim", 5, 1.5)


@pytest.fixture(scope="module")
def quantized(pipeline, tiny_recipe, tmp_path_factory) -> tuple[Path, Summary]:
    """An artifact of the pipeline, and what `quantize` said about it."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny-w8a8"
    return out, workflow.quantize(pipeline, out, tiny_recipe("plus"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_artifact_folder_has_everything_that_sampling_needs(quantized, scheduler_config) -> None:
    folder, _ = quantized
    assert set(files_of(folder)) == {
        "README.md", "model_index.json", "tqdit.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/tqdit.json", "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    source = resolve(folder)
    assert source.quantized
    assert source.scheduler == scheduler_config
    assert source.labels[7] == "class 7"
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["preset"], config["weight_bits"], config["activation_bits"]) == ("plus", 8, 8)


def test_summary_of_quantize(quantized, model) -> None:
    folder, summary = quantized
    size = sum(len(data) for name, data in files_of(folder).items() if name.endswith("safetensors"))
    assert summary["size_bytes"] == size == artifact.size_bytes(folder)
    assert summary["float32_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert summary["size_ratio"] == pytest.approx(size / summary["float32_bytes"])
    assert summary["size_ratio_bfloat16"] == pytest.approx(2 * size / summary["float32_bytes"])
    assert (summary["file_dtype"], summary["file_bytes"]) == ("float32", summary["float32_bytes"])
    assert summary["size_ratio_file"] == pytest.approx(summary["size_ratio"])
    assert summary["calibration_seconds"] > 0
    assert summary["processes"] == 1
    assert summary["peak_memory_bytes"] > 2**20
    assert {"tqdit", "torch", "cpu", "cores", "threads", "device"} <= set(summary["environment"])
    assert (summary["preset"], summary["bits"]) == ("plus", "w8a8")
    assert summary["bits"] is summary.bits
    with pytest.raises(KeyError):
        summary["colour"]
    assert json.loads(json.dumps(summary.figures(), allow_nan=False)) == summary.figures()


def test_codes_of_a_larger_model_take_a_quarter_of_fp32(tiny_dit, tiny_recipe, tmp_path) -> None:
    """The tiny model is mostly names and scales; width 128 shows the ratio of W8 (and 6/8 of it at W6)."""
    model = tiny_dit(num_layers=1, num_attention_heads=4, attention_head_dim=32)
    model.save_pretrained(tmp_path / "model")
    ratios = {}
    for bits in ("w8a8", "w6a6"):
        recipe = tiny_recipe("plus", bits, rounds=0, hessian=False, samples=1, groups=2, steps=4)
        ratios[bits] = workflow.quantize(tmp_path / "model", tmp_path / bits, recipe)["size_ratio"]
    assert ratios["w8a8"] < 0.32
    assert ratios["w6a6"] < ratios["w8a8"] - 0.01


def test_provenance_says_how_it_was_made(quantized, model, tiny_recipe) -> None:
    provenance = artifact.read(quantized[0]).provenance
    assert provenance.recipe == tiny_recipe("plus").model_dump(mode="json")
    assert provenance.source == "tiny-dit"
    assert provenance.source_sha256 == weights_hash(model)
    assert set(provenance.versions) == {"tqdit", "torch", "diffusers"}
    assert len(provenance.calibration_sha256) == 64


def test_twice_the_same_bytes(quantized, pipeline, tiny_recipe, tmp_path) -> None:
    workflow.quantize(pipeline, tmp_path / "again", tiny_recipe("plus"))
    assert files_of(tmp_path / "again") == files_of(quantized[0])


def test_one_calibration_serves_several_bit_widths(quantized, pipeline, tiny_recipe) -> None:
    prepared = workflow.prepare(pipeline, tiny_recipe("plus"))
    for bits in ("w8a8", "w6a6"):
        solution, seconds = workflow.solve_prepared(prepared, tiny_recipe("plus", bits))
        assert seconds > 0
        bits_of = {site.bits for site in solution.sites if site.role is Role.INPUT}
        assert bits_of == {int(bits[-1])}
    eight, _ = workflow.solve_prepared(prepared, tiny_recipe("plus"))
    stored = artifact.read(quantized[0])
    assert all(torch.equal(p.scale, stored.params[name].scale) for name, p in eight.params.items())


def test_records_of_other_calibration_settings_are_refused(pipeline, tiny_recipe) -> None:
    prepared = workflow.prepare(pipeline, tiny_recipe(hessian=False))
    workflow.solve_prepared(prepared, tiny_recipe(hessian=False, rounds=0))
    for other in (tiny_recipe(hessian=False, seed=1), tiny_recipe(hessian=True)):
        with pytest.raises(InputError, match="calibration settings"):
            workflow.solve_prepared(prepared, other)


def test_inspect_lists_every_site(quantized, model, tiny_recipe) -> None:
    found = workflow.inspect(quantized[0])
    expected = sites(config_of(model), tiny_recipe("plus"))
    assert found["backend"] == "cpu"
    assert [row["name"] for row in found["sites"]] == [site.name for site in expected]
    for row, site in zip(found["sites"], expected, strict=True):
        assert set(row) == {"name", "role", "bits", "grid", "groups", "granularity", "channels", "kernel"}
        assert (row["role"], row["bits"], row["groups"]) == (site.role, site.bits, site.groups)
        assert row["granularity"] == site.granularity
        assert row["kernel"].startswith("cpu.")
    json.dumps(found, allow_nan=False)
    simulated = workflow.inspect(quantized[0], backend="simulated")
    assert {row["kernel"].split(".")[0] for row in simulated["sites"]} == {"simulated"}


def test_a_pipeline_is_sealed_whatever_its_transformers_folder_is_called(quantized, tmp_path) -> None:
    """The scheduler is read from the pipeline around: what its seal says holds for that transformer too."""
    out = shutil.copytree(quantized[0], tmp_path / "out")
    (out / "transformer").rename(out / "transformer_ema")
    workflow.load(out / "transformer_ema")
    scheduler = out / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.004", "0.02"))
    for use in (workflow.load, workflow.inspect):
        with pytest.raises(InputError, match=r"scheduler_config\.json was changed"):
            use(out / "transformer_ema")


def test_inspect_of_a_float_model_is_an_error(pipeline) -> None:
    with pytest.raises(InputError, match="not quantized"):
        workflow.inspect(pipeline)


# Sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling_is_deterministic(quantized, sampler: str) -> None:
    sampling = Sampling(sampler, 5, 1.5)
    first, again, other = (workflow.sample(quantized[0], [], 3, sampling, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 1, 8, 8)
    assert torch.isfinite(first).all()
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_quantized_images_are_those_of_the_float_model(quantized, pipeline) -> None:
    images = [workflow.sample(model, [], 6, FAST, 3) for model in (pipeline, quantized[0])]
    assert sqnr_db(*images) > 15
    assert sqnr_db(images[0], workflow.sample(pipeline, [], 6, FAST, 4)) < 5  # another seed is another image


def test_classes_by_name_cycle(quantized) -> None:
    cycled = workflow.sample(quantized[0], ["class 3", "5"], 3, FAST)
    assert workflow.images_of(quantized[0], ["class 3", "5"], 3, FAST).labels == [3, 5, 3]
    assert workflow.images_of(quantized[0], [], 12, FAST).labels == [*range(10), 0, 1]
    alone = workflow.sample(quantized[0], ["class 3"], 1, FAST)
    assert sqnr_db(cycled[:1], alone) > 30
    assert workflow.images_of(quantized[0], ["class 3", 5], 3).labels == [3, 5, 3]
    assert torch.equal(workflow.sample(quantized[0], [3, 5], 3, FAST), cycled)


def test_images_become_files(quantized, tmp_path) -> None:
    images = workflow.sample(quantized[0], [3], 2, FAST)
    sizes = [(image.mode, image.size) for image in tqdit.to_pil(images)]
    assert sizes == [("L", (8, 8))] * 2
    tqdit.save_grid(images, str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["boot"]}, "unknown class 'boot'"),
        ({"num": 0}, "num must be a whole number of at least 1, got 0"),
        ({"sampling": Sampling("ddim", 2000)}, "at most the 1000"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"classes": "boot"}, "must be a list of names"),
        ({"classes": 3}, r"must be a list, got the number 3; give \[3\]"),
        ({"classes": [10]}, "unknown class '10'"),
        ({"classes": [-1]}, "unknown class '-1'"),
        ({"dtype": torch.int8}, "dtype 'int8' is not one of float32, float16, bfloat16"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": "toaster"}, "device 'toaster' is not available"),
    ],
)
def test_bad_sampling_arguments(quantized, arguments: dict, message: str) -> None:
    defaults = {"classes": [], "num": 1, "sampling": FAST}
    with pytest.raises(InputError, match=message):
        workflow.sample(quantized[0], **defaults | arguments)


def test_progress_names_the_stages(pipeline, tiny_recipe, tmp_path) -> None:
    told: list[tuple[str, float]] = []
    recipe = tiny_recipe(rounds=0)
    workflow.quantize(pipeline, tmp_path / "out", recipe, report=lambda stage, done: told.append((stage, done)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["trajectories", "statistics", "search"]
    for stage in ("trajectories", "statistics", "search"):
        assert [done for name, done in told if name == stage][-1] == pytest.approx(1)


# What may go wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["trajectories", "statistics", "search"])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_quantize_leaves_nothing(pipeline, tiny_recipe, tmp_path, stage: str, exists: bool) -> None:
    recipe = tiny_recipe(rounds=0, hessian=False)
    target = tmp_path / "out"
    if exists:
        workflow.quantize(pipeline, target, recipe)
    before = files_of(tmp_path)

    def interrupt(name: str, fraction: float) -> None:
        if name == stage and fraction > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workflow.quantize(pipeline, target, tiny_recipe("plus"), overwrite=True, report=interrupt)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("trajectories", 0.9),
        ("statistics", 0.2),
        pytest.param("statistics", 0.9, marks=pytest.mark.long),
        pytest.param("search", 0.1, marks=pytest.mark.long),
        ("search", 0.9),
    ],
)
def test_resumed_quantize_gives_the_same_bytes(
    quantized, pipeline, tiny_recipe, tmp_path, monkeypatch, stage: str, after: float
) -> None:
    target, work = tmp_path / "out", tmp_path / "out.work"

    def interrupt(name: str, fraction: float) -> None:
        if name == stage and fraction > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workflow.quantize(pipeline, target, tiny_recipe("plus"), report=interrupt, resumable=True)
    finished = set(files_of(work))
    made: list[str] = []
    monkeypatch.setattr(store, "write_bytes", lambda path, data: (made.append(path.name), write_bytes(path, data)))
    workflow.quantize(pipeline, target, tiny_recipe("plus"), resumable=True)
    assert files_of(target) == files_of(quantized[0])
    assert made
    assert not {Path(name).name for name in finished} & set(made)  # nothing was made twice
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_recipe_or_model_starts_anew(
    pipeline, own_pipeline, tiny_recipe, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str, fraction: float) -> None:
        if name == "search" and fraction > 0.5:
            raise KeyboardInterrupt

    def folders(source: Path, **settings: object) -> list[Path]:
        before = {*(tmp_path / "out.work").glob("*")}
        with pytest.raises(KeyboardInterrupt):
            workflow.quantize(source, tmp_path / "out", tiny_recipe(**settings), report=interrupt, resumable=True)
        return sorted({*(tmp_path / "out.work").glob("*")} - before)

    (own_pipeline / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 500}')
    assert [p.name.split("-")[0] for p in folders(pipeline)] == ["calibration", "search"]
    assert folders(pipeline) == []
    assert [p.name.split("-")[0] for p in folders(pipeline, rounds=1)] == ["search"]
    assert len(folders(pipeline, seed=1)) == 2
    assert len(folders(own_pipeline)) == 2
    config = own_pipeline / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4, "attention_head_dim": 8}))
    assert len(folders(own_pipeline)) == 2  # the same weights in other heads
    here = trajectories.draws_in_bf16(torch.device("cpu"))
    monkeypatch.setattr(trajectories, "draws_in_bf16", lambda device: not here)
    assert len(folders(own_pipeline)) == 2  # on another CPU


@pytest.mark.parametrize("stage", ["records-000000-000008", "solved-transformer_blocks.0.attn1.scores"])
def test_damaged_work_is_made_anew(quantized, pipeline, tiny_recipe, tmp_path, stage: str) -> None:
    def interrupt(name: str, fraction: float) -> None:
        if name == "search" and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe("plus"), report=interrupt, resumable=True)
    (piece,) = (tmp_path / "out.work").glob(f"*/{stage}.safetensors")
    data = bytearray(piece.read_bytes())
    data[-2] ^= 1
    piece.write_bytes(data)
    with pytest.warns(RepairWarning, match=rf"{stage}\.safetensors is damaged: .*; it is made anew"):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe("plus"), resumable=True)
    assert files_of(tmp_path / "out") == files_of(quantized[0])


def test_killed_before_its_work_was_removed(quantized, pipeline, tiny_recipe, tmp_path, monkeypatch) -> None:
    """The same command finds that all is done; another one finds an output that exists."""
    out, work, recipe = tmp_path / "out", tmp_path / "out.work", tiny_recipe("plus")
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "discard", lambda *_: None)
        workflow.quantize(pipeline, out, recipe, resumable=True)
    assert list(work.iterdir())

    def no_work(*_: object) -> None:
        pytest.fail("work was done")

    with pytest.raises(InputError, match="exists"):
        workflow.quantize(pipeline, out, tiny_recipe("plus", rounds=0), report=no_work, resumable=True)
    loaded = []
    monkeypatch.setattr(quantizing, "load_float", lambda source: loaded.append(source) or load_float(source))
    with pytest.warns(RepairWarning, match="out was finished by a run that was interrupted afterwards"):
        found = workflow.quantize(pipeline, out, recipe, report=no_work, resumable=True)
    assert files_of(out) == files_of(quantized[0])
    assert len(loaded) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    same = ("name", "preset", "bits", "size_bytes", "float32_bytes", "environment")
    assert [found[key] for key in same] == [quantized[1][key] for key in same]
    with pytest.raises(InputError, match="exists"):
        workflow.quantize(pipeline, out, recipe, report=no_work, resumable=True)
    work.mkdir()  # killed when the empty folder was all that was left
    (out / "transformer" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="exists"):
        workflow.quantize(pipeline, out, recipe, report=no_work, resumable=True)


def test_work_folder_may_be_a_link(quantized, pipeline, tiny_recipe, tmp_path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out.work").symlink_to(tmp_path / "large-disk")
    workflow.quantize(pipeline, tmp_path / "out", tiny_recipe("plus"), resumable=True)
    assert files_of(tmp_path / "out") == files_of(quantized[0])
    assert (tmp_path / "out.work").is_symlink()
    assert list((tmp_path / "large-disk").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large-disk", "out", "out.work"]


@pytest.mark.parametrize("busy", ["out", "out.work"])
def test_output_that_another_process_is_writing(pipeline, tiny_recipe, tmp_path, busy: str) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("work was done")

    with holding(beside(tmp_path / busy, "lock"), tmp_path / busy):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=rf"is writing .*/{busy}; wait until it has ended"):
            workflow.quantize(pipeline, tmp_path / "out", tiny_recipe(), report=no_work, resumable=True)
        assert sorted(tmp_path.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_too_small_for_the_artifact(pipeline, tiny_recipe, tmp_path, monkeypatch) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("work was done")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000))
    with pytest.raises(InputError, match=r"output .*/out takes about 0\.\d MB, and .* has 0\.0 MB free"):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe(), report=no_work)


def test_needed_space_is_no_more_than_an_artifact_takes(pipeline, model, tiny_recipe, quantized, monkeypatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(quantizing, "check_space", lambda _, count: needed.append(count))
    monkeypatch.setattr(quantizing, "calibrated", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        workflow.quantize(pipeline, quantized[0].with_name("new"), tiny_recipe("plus"))
    assert 0.5 * quantized[1]["size_bytes"] / 4 < needed[0] < quantized[1]["size_bytes"]


def test_work_folder_that_is_a_file_is_refused(pipeline, tiny_recipe, tmp_path) -> None:
    (tmp_path / "out.work").write_text("mine")
    with pytest.raises(InputError, match=r"out\.work is a file"):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe(), resumable=True)


def test_work_folder_that_another_machine_does_not_see_is_refused(pipeline, tiny_recipe, tmp_path, monkeypatch) -> None:
    """Rank 1 does not find what rank 0 has put there, and leaves no folder of its own."""
    monkeypatch.setattr(distributed, "_current", World(1, 2))
    monkeypatch.setattr(World, "wait", lambda _: None)
    monkeypatch.setattr(World, "add", lambda _, mine: mine if mine.ndim else mine + 12345)
    with pytest.raises(InputError, match=r"resumable: .*out\.work is not on a file system that all processes share"):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe(), resumable=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_nothing(pipeline, tiny_recipe, tmp_path, monkeypatch, exists: bool) -> None:
    recipe, target = tiny_recipe(rounds=0, hessian=False), tmp_path / "out"
    if exists:
        workflow.quantize(pipeline, target, recipe)
    before = files_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        workflow.quantize(pipeline, target, recipe, overwrite=True)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])


def test_a_source_that_goes_away_during_the_search(own_pipeline, tiny_recipe, tmp_path) -> None:
    """All that is said about it is read before the work."""

    def remove(stage: str, fraction: float) -> None:
        if (stage, fraction) == ("search", 1.0):
            shutil.rmtree(own_pipeline)

    recipe = tiny_recipe("plus", rounds=0)
    assert workflow.quantize(own_pipeline, tmp_path / "out", recipe, report=remove)["file_bytes"] > 0
    assert not own_pipeline.exists()


def test_existing_output_is_refused_before_any_work(pipeline, tiny_recipe, tmp_path) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("work was done")

    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        workflow.quantize(pipeline, tmp_path / "out", tiny_recipe(), report=no_work)


def test_float_model_cannot_be_the_output(own_pipeline, tiny_recipe) -> None:
    before = files_of(own_pipeline)
    for target in (own_pipeline, own_pipeline / "transformer"):
        with pytest.raises(InputError, match="not an artifact"):
            workflow.quantize(own_pipeline, target, tiny_recipe(), overwrite=True)
    assert files_of(own_pipeline) == before


def test_quantizing_an_artifact_is_an_error(quantized, tiny_recipe, tmp_path) -> None:
    with pytest.raises(InputError, match="already quantized"):
        workflow.quantize(quantized[0], tmp_path / "out", tiny_recipe())


def test_load_gives_integers_or_floats(quantized, pipeline) -> None:
    assert workflow.load(quantized[0]).quantization_backend == "cpu"
    assert workflow.load(quantized[0], backend="reference").quantization_backend == "reference"
    assert workflow.load(quantized[0], backend="simulated").quantization_backend == "simulated"
    assert not hasattr(workflow.load(pipeline), "quantization_backend")


@pytest.mark.parametrize(
    ("backend", "message"),
    [("cuda", "unknown backend 'cuda'"), ("cpu", "float model, which torch runs; backend 'cpu'")],
)
def test_a_float_model_has_no_integer_backend(pipeline, backend: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        workflow.load(pipeline, backend=backend)


def test_the_automatic_device(automatic_device, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "chosen_device", automatic_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Target(device="auto").device == Target().device == torch.device("cpu")
    assert Target(device=torch.device("cpu")).device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.chosen_device() == "cuda"
    assert distributed.chosen_device("cpu") == "cpu"


def test_dtype_is_that_of_an_artifacts_stream(quantized, pipeline) -> None:
    folder, _ = quantized
    assert workflow.load(folder, dtype="bfloat16").stream_dtype is torch.bfloat16
    assert workflow.load(folder, dtype=torch.bfloat16, device=torch.device("cpu")).stream_dtype is torch.bfloat16
    drawn = [workflow.sample(folder, ["1"], 1, FAST, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert drawn[0].dtype is drawn[1].dtype is torch.float32
    assert not torch.equal(*drawn)
    assert sqnr_db(*drawn) > 15
    with pytest.raises(InputError, match="is a float model and runs in float32; dtype 'bfloat16' is for artifacts"):
        workflow.load(pipeline, dtype="bfloat16")
    with pytest.raises(InputError, match=r"dtype torch\.int8 is not one of"):
        convert(artifact.read(resolve(folder).folder), dtype=torch.int8)
