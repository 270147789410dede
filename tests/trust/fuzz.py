"""Random changes of everything that is read: each is accepted or refused with one `InputError`, and nothing else.

`run` gives every target its share of the time, in a child process with a limit of memory and of seconds per input, so
that a crash or a bomb costs that child alone. The same seed gives the same inputs.
"""

import copy
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from published_dit import random_dit
from safetensors.torch import load_file

from tqdit.architectures import registry
from tqdit.artifact import folder as artifact
from tqdit.artifact import tensors
from tqdit.artifact.manifest import FORMATS
from tqdit.errors import InputError
from tqdit.grids import packing
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.schedules import schedule
from tqdit.sources.labels import class_indices
from tqdit.sources.resolve import load_float, resolve
from tqdit.speed.random_solution import random_solution
from tqdit.system.files import WEIGHTS, read_json, read_weights, write_json

MEMORY = 4 << 30  # what a child may take more than it has
SECONDS = 20  # for one input
KEPT = 20  # failures that are described
CONFIG = {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4, "patch_size": 2,
    "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 4,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
    "beta_end": 4e-3, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 8, 255, 2**31, 2**63, 10**12, 10**30, -(10**9), 0.0, -0.0, 0.5, 6.0, 1e-300,
    1e300, math.nan, math.inf, -math.inf, "", "0", "-1", "nan", "x", "é", "\ud800", "\x1b[31m", "a\nb", "../x", "/etc",
    "9" * 5000, "x" * 5000, [], [0], [[]], {}, {"": 0}, [None, 1], "input", "gelu", "mrq_gelu", "uniform", "linear",
    "v_prediction",
)  # fmt: skip

INSERTED = (
    b"9" * 5000, b"[" * 20000, b'"', b"\xff", b"\0", b"{", b".", b"a." * 500, b"-", b"1e999", b"null", b"\n",
    b"\x1b[2J",
)  # fmt: skip

Target = Callable[[random.Random], bool]  # one input: whether it was accepted


@dataclass
class Counts:
    """What became of the inputs of one target."""

    executions: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)  # of the first `KEPT`: the kind and the place


def run(
    made: dict[str, Target], scratch: Path, minutes: float = 0.0, count: int = 0, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Counts by target: `count` inputs each, or as many as fit into the `minutes` of all of them together."""
    torch.set_num_threads(1)
    seconds = 60 * minutes / len(made)
    return {name: asdict(_fuzzed(target, name, seconds, count, seed, scratch / "log")) for name, target in made.items()}


def targets(root: Path) -> dict[str, Target]:
    """What is fuzzed, on tiny models made in `root`."""
    model = _float_model(root / "float")
    return {
        "recipe file": _recipe_file(root / "recipe.toml"),
        "recipe settings": _recipe_settings(),
        "bits": _bits(),
        "manifest": _manifest(root / "artifact", resolve(model).config),
        "config": _json_file(model, Path("transformer", "config.json"), lambda path: load_float(resolve(path))),
        "scheduler": _json_file(model, Path("scheduler", "scheduler_config.json"), _scheduled),
        "class names": _json_file(model, Path("model_index.json"), _classes_of),
        "class lists": _class_lists(model),
        "safetensors": _safetensors(model),
        "packing": packed,
        "checkpoint": _checkpoint(root / "official.pt"),
    }


# Targets -------------------------------------------------------------------------------------------------------------


def _recipe_file(path: Path) -> Target:
    texts = [Recipe(preset).to_toml().encode() for preset in ("paper", "plus")]

    def target(rng: random.Random) -> bool:
        path.write_bytes(changed_bytes(rng.choice(texts), rng))
        Recipe.from_toml(path)
        return True

    return target


def _recipe_settings() -> Target:
    known = Recipe().model_dump()
    names_of_settings = [*(set(known) - {"preset"}), "unknown"]
    names_of_settings.sort()

    def target(rng: random.Random) -> bool:
        names = rng.sample(names_of_settings, rng.randint(1, 4))
        Recipe(rng.choice(["paper", "plus"]), "w8a8", **{name: strange(known.get(name), rng) for name in names})
        return True

    return target


def _bits() -> Target:
    def target(rng: random.Random) -> bool:
        bits = list(f"{rng.choice('wW')}{rng.randint(1, 9)}{rng.choice('aA')}{rng.randint(1, 9)}")
        for _ in range(rng.randint(0, 3)):
            bits[rng.randrange(4)] = rng.choice(["w", "a", "8", "9", "-", " ", "\u0663", "\u00b2", "\n", "", "88"])
        Recipe(bits="".join(bits))
        return True

    return target


def _manifest(folder: Path, config: Any) -> Target:
    solution = random_solution(config, Recipe("plus", groups=2))
    folder.mkdir(parents=True)
    artifact.write(solution, folder)
    found, config = load_file(folder / WEIGHTS), read_json(folder / "config.json")
    manifest = json.loads(bytes(found[tensors.MANIFEST_TENSOR].tolist()))

    former = {**manifest, "time_groups": {"num_timesteps": 1000, "num_groups": 2}}  # as format 2 has it

    def target(rng: random.Random) -> bool:
        version = rng.choice(sorted(FORMATS))
        forged = changed(copy.deepcopy(former if version == 2 else manifest), rng)
        outside = copy.deepcopy(config)
        outside["quantization_config"]["format_version"] = version
        twin = forged.get("model_config") if isinstance(forged, dict) else None
        if isinstance(twin, dict) and rng.random() < 0.3:  # the same change in both copies of the model's config
            key = rng.choice(sorted(CONFIG))
            outside[key] = twin[key] = strange(outside.get(key), rng)
        text = json.dumps(forged).encode()
        outside["quantization_config"]["manifest_sha256"] = hashlib.sha256(text).hexdigest()
        forged_tensors = {**found, tensors.MANIFEST_TENSOR: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        convert(tensors.unpack(forged_tensors, outside, "it"), "reference")
        return True

    return target


def _json_file(model: Path, name: Path, read: Callable[[Path], object]) -> Target:
    copied = Path(shutil.copytree(model, model.with_name(f"of-{name.stem}")))
    original = (model / name).read_bytes()

    def target(rng: random.Random) -> bool:
        if rng.random() < 0.3:
            data = changed_bytes(original, rng)
        else:
            data = json.dumps(changed(json.loads(original), rng)).encode()
        (copied / name).write_bytes(data)
        read(copied)
        return True

    return target


def _scheduled(path: Path) -> None:
    source = resolve(path)
    for sampler in ("ddim", "ddpm"):
        schedule(source.scheduler, Sampling(sampler, 3, 1.5), registry.sample(source.config))


def _classes_of(path: Path) -> None:
    source = resolve(path)
    class_indices(source, list(source.labels.values())[:2] or ["0"])


def _class_lists(model: Path) -> Target:
    source = resolve(model)

    def target(rng: random.Random) -> bool:
        names = ["cat", "0", " 1", "-1", "9" * 5000, "٣", "²", "", "dog", "4", "1e0", "\ud800", "cat\n"]
        class_indices(source, [rng.choice(names) for _ in range(rng.randint(0, 4))])
        return True

    return target


def _safetensors(model: Path) -> Target:
    copied = Path(shutil.copytree(model, model.with_name("of-safetensors")))
    path = copied / "transformer" / WEIGHTS
    original = path.read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")

    def target(rng: random.Random) -> bool:
        header = changed_bytes(original[8:length], rng)
        if rng.random() < 0.5:
            header = json.dumps(changed(json.loads(original[8:length]), rng)).encode()
        size = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**32, 2**63, max(0, len(header) - 1)])
        data = original[length:] if rng.random() < 0.8 else changed_bytes(original[length:], rng)
        path.write_bytes(size.to_bytes(8, "little") + header + data)
        read_weights(path.parent)
        load_float(resolve(copied))
        return True

    return target


def packed(rng: random.Random) -> bool:
    """The layout against one big integer, and shapes that do not fit."""
    bits = rng.randint(2, 8)
    shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(0, 3)))
    codes = [rng.randint(-(1 << bits - 1), (1 << bits - 1) - 1) for _ in range(math.prod(shape))]
    stream = sum((code & (1 << bits) - 1) << bits * i for i, code in enumerate(codes))
    expected = stream.to_bytes((len(codes) * bits + 7) // 8, "little")
    found = packing.pack(torch.tensor(codes, dtype=torch.int8).reshape(shape), bits)
    if bytes(found.tolist()) != expected:
        raise AssertionError(f"{codes} at {bits} bits are not packed as one integer")
    if packing.unpack(found, bits, shape).flatten().tolist() != codes:
        raise AssertionError(f"{codes} at {bits} bits are not unpacked")
    packing.unpack(found, bits, tuple(rng.choice([-1, 0, 1, side, side + 1, -side]) for side in (*shape, 2)))
    return True


def _checkpoint(path: Path) -> Target:
    state = random_dit(depth=1, width=16, heads=2, channels=1, side=4, classes=4).state_dict()
    torch.save(state, path)
    original = path.read_bytes()

    def target(rng: random.Random) -> bool:
        if rng.random() < 0.5:
            path.write_bytes(changed_bytes(original, rng))
        else:
            torch.save(_changed_state(dict(state), rng), path)
        load_float(resolve(path, num_heads=2))
        return True

    return target


def _changed_state(state: dict[Any, Any], rng: random.Random) -> Any:
    name = rng.choice(list(state))
    value = state[name]
    kind = rng.randrange(8)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[rng.choice(["x", 3, None, f"blocks.{10**6}.attn.qkv.weight", "blocks.-1.mlp.fc1.weight"])] = value
    elif kind == 2:
        state[name] = rng.choice(STRANGE)
    elif kind == 3:
        state[name] = value.to(rng.choice([torch.int8, torch.bool, torch.float64, torch.complex64, torch.bfloat16]))
    elif kind == 4:
        state[name] = torch.full_like(value, rng.choice([math.nan, math.inf, 3e38]))
    elif kind == 5:
        state[name] = rng.choice(
            [value[:0], value.flatten(), value[None], value.expand(2, *value.shape), value[..., :1]]
        )
    elif kind == 6:
        state[name] = torch.zeros(()).expand(rng.choice([(1, 1), (10**6, 10**6), (2**20, 16)]))
    else:
        return rng.choice([{"ema": state, "model": 3}, {"model": state, "args": None}, [state], {}, value, {"ema": {}}])
    return state


# Changes -------------------------------------------------------------------------------------------------------------


def strange(value: Any, rng: random.Random) -> Any:
    """Another value: near the given one, or none that anyone expects."""
    if isinstance(value, int | float) and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, -value, value * 2, value / 2, float(value), str(value), [value]])
    return copy.deepcopy(rng.choice(STRANGE))


def changed(value: Any, rng: random.Random) -> Any:
    """JSON with one to three entries removed, renamed, repeated, exchanged or replaced."""
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return strange(value, rng)
        owner, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del owner[key]
        elif kind == 1:
            other_owner, other = rng.choice(places)
            owner[key] = copy.deepcopy(other_owner[other])
        elif kind == 2 and isinstance(owner, dict):
            owner[rng.choice(["x", "", f"{key}x", "\ud800"])] = owner.pop(key)
        elif kind == 3 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[key] = strange(owner[key], rng)
    return value


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value, those near the root as often as leaves."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four flips, cuts, repetitions or insertions."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not found:
            break
        start = rng.randrange(len(found))
        end = min(len(found), start + rng.choice([1, 1, 2, 8, 64]))
        kind = rng.randrange(7)
        if kind < 2:
            found[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del found[start:end]
        elif kind == 3:
            found[start:start] = found[start:end] * rng.choice([1, 2, 50])
        elif kind == 4:
            inserted = [
                b"9" * 5000,
                b"[" * 20000,
                b'"',
                b"\xff",
                b"\0",
                b"{",
                b".",
                b"a." * 500,
                b"-",
                b"1e999",
                b"null",
            ]
            found[start:start] = rng.choice(inserted)
        elif kind == 5:
            del found[start:]
        else:
            found[start:end] = rng.randbytes(end - start)
    return bytes(found)


# Running -------------------------------------------------------------------------------------------------------------


def _fuzzed(target: Target, name: str, seconds: float, count: int, seed: int, log: Path) -> Counts:
    """In children: another takes over where one was killed, after the input that it had begun."""
    counts, first, end = Counts(), 0, time.monotonic() + seconds
    while (first < count) if count else (time.monotonic() < end):
        code = _child(target, name, seed, first, count, end, log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "outcome" in line:
                _take(counts, line["outcome"], line.get("failure", ""))
        last = max((line["begun"] for line in lines if "begun" in line), default=first)
        if code != 0:
            _take(counts, "failed", f"input {last} of seed {seed}: the process ended with {code}")
        first = last + 1
    return counts


def _take(counts: Counts, outcome: str, failure: str) -> None:
    counts.executions += 1
    setattr(counts, outcome, getattr(counts, outcome) + 1)
    if failure and len(counts.failures) < KEPT and failure.partition(": ")[2] not in "\n".join(counts.failures):
        counts.failures.append(failure)


def _child(target: Target, name: str, seed: int, first: int, count: int, end: float, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    log.write_text("")
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        _limit()
        with log.open("a") as told:
            i = first
            while (i < count) if count else (time.monotonic() < end):
                told.write(json.dumps({"begun": i}) + "\n")
                told.flush()
                outcome = _one(target, random.Random(f"{name} {seed} {i}"), f"input {i} of seed {seed}")
                told.write(json.dumps(outcome) + "\n")
                i += 1
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _one(target: Target, rng: random.Random, what: str) -> dict[str, str]:
    signal.alarm(SECONDS)
    try:
        target(rng)
    except InputError as error:
        if "\n" in str(error):
            return {"outcome": "failed", "failure": f"{what}: an InputError of several lines: {str(error)[:200]!r}"}
        return {"outcome": "refused"}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(last) if "/tqdit/" in frame.filename), last[-1])
        where = f"{Path(ours.filename).name}:{ours.name}"
        return {"outcome": "failed", "failure": f"{what}: {type(error).__name__} in {where}: {str(error)[:100]!r}"}
    finally:
        signal.alarm(0)
    return {"outcome": "accepted"}


def _limit() -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child: native code does not come back to Python
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _float_model(root: Path) -> Path:
    torch.manual_seed(0)
    DiTTransformer2DModel(**CONFIG).save_pretrained(root / "transformer")
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    labels = {"0": "cat", "1": "dog, hound", "3": "boot"}
    write_json(root / "model_index.json", {"_class_name": "DiTPipeline", "id2label": labels})
    return root
