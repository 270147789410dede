"""`bench/equivalence.py` on a tiny model of 32 x 32 pixels: repeats, further settings, and a run that goes on."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tqdit import workflow
from tqdit.sampling.guidance import Sampling

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "equivalence.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = spec_from_file_location("bench_equivalence", SCRIPT)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(bench, tiny_dit, tiny_recipe, scheduler_config, tmp_path, monkeypatch) -> list[str]:
    """The words of a short run; what the script takes for the bundled model is a tiny one."""
    root = tmp_path / "tiny"
    tiny_dit(num_layers=1, sample_size=32, patch_size=8).save_pretrained(root / "transformer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config))
    workflow.quantize(root, tmp_path / "w8a8", tiny_recipe(samples=1, rounds=0, hessian=False))
    noise = torch.randint(0, 256, (47, 28, 28), dtype=torch.uint8).numpy().tobytes()
    header = b"".join(value.to_bytes(4, "big") for value in (2051, 47, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + noise)
    monkeypatch.setattr(bench, "MODEL", str(root))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # put back afterwards
    out = ["--json", str(tmp_path / "out.json"), "--real", str(tmp_path), "--device", "cpu", "--batch", "20"]
    return ["--artifacts", str(tmp_path / "w8a8"), "--num", "40", "--steps", "2", "--seeds", "5", "6", "7", *out]


def run(bench: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["equivalence.py", *words])
    bench.main()
    return json.loads(Path(words[words.index("--json") + 1]).read_text())


def test_every_setting_is_repeated_and_an_earlier_run_goes_on(bench, words, monkeypatch) -> None:
    first = run(bench, words, monkeypatch)
    both = run(bench, [*words, "--also", "ddpm:1:1", "--also-num", "60"], monkeypatch)
    assert both["trials"][:2] == first["trials"]  # with their seconds, so they were not measured again
    heads = [(t["sampler"], t["steps"], t["guidance"], t["num"], t["seed"], t["other_seed"]) for t in both["trials"]]
    assert heads == [
        ("ddim", 2, 1.5, 40, 5, 6), ("ddim", 2, 1.5, 40, 6, 7), ("ddpm", 1, 1.0, 60, 5, 6), ("ddpm", 1, 1.0, 60, 6, 7),
    ]  # fmt: skip
    assert set(first["trials"][0]["seconds"]) == {"float32, seed 5", "float32, seed 6", "bfloat16", "w8a8"}
    assert set(first["trials"][1]["seconds"]) == {"float32, seed 7", "bfloat16", "w8a8"}
    for trial in both["trials"]:
        rows = trial["models"]
        assert list(rows) == ["float32", "bfloat16", "w8a8"]
        assert rows["float32"]["psnr_db"] is None
        assert not rows["bfloat16"]["verdict"]["closer_than_bf16"]
        assert rows["w8a8"]["verdict"]["n"] == trial["num"]
        assert rows["w8a8"]["verdict"]["exact"] == 0
    artifact = both["settings"]["artifacts"]["w8a8"]
    assert (artifact["bits"], len(artifact["weights_sha256"])) == ("w8a8", 64)
    assert both["settings"]["real_images"] == 40  # the most that 20 blocks share
    assert both["command"].startswith("python bench/equivalence.py --artifacts w8a8 --num 40")
    other = {**both, "settings": {}}
    assert bench.kept_trials(Path(words[words.index("--json") + 1]), other) == []


def test_options_that_do_not_fit(bench, monkeypatch, capsys) -> None:
    assert bench.setting("ddpm:250:1.5") == Sampling("ddpm", 250, 1.5)
    for words, message in (
        (["--bundle"], "--bundle needs --real"),
        (["--real", "x"], "--json and --artifacts are needed"),
        (["--artifacts", "a", "--json", "x", "--seeds", "1"], "two or more different seeds"),
        (["--artifacts", "a/x", "b/x", "--json", "x"], "different names"),
        (["--also", "ddpm:250"], "invalid setting"),
    ):
        monkeypatch.setattr(sys, "argv", ["equivalence.py", *words])
        with pytest.raises(SystemExit):
            bench.arguments()
        assert message in capsys.readouterr().err
