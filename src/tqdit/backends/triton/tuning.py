"""Choose the blocks and the schedule of each kernel.

For GPUs that we measured the choice is committed; for others it is timed and kept.

A configuration changes speed alone, but for the last bits of LayerNorm and of layers on float inputs. Where none is
committed the first call of every kernel and shape compiles and times the candidates (seconds), and keeps the best in
the user's cache folder (TQDIT_CACHE).
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
import triton
from triton.errors import TritonError

from tqdit.backends.triton.kernels.rounding import SOFTMAX_ROW, UNIFORM
from tqdit.backends.triton.launch import FEW_ROWS
from tqdit.backends.triton.layouts import NATIVE, Config
from tqdit.system.capture import recording
from tqdit.system.environment import cores
from tqdit.system.files import write_text

LOG = logging.getLogger(__name__)
TUNED = Path(__file__).with_name("tuned")
INTERPRETED = {
    "linear": Config(32, 32, 128), "attention": Config(32, 0, 64), "float": Config(16, 32, 64),
    "norm": Config(2, 0, 0, blocks=2), "quantize": Config(32, 64, 0),
}  # fmt: skip
ROUNDS, ROUND_MS = 5, 4
CHANNELS = "-channels"  # the end of the name of an epilogue with channel factors
THREADS = 16  # threads that compile; each holds one output of the kernel
OLDEST = 9  # numbers of a configuration in the oldest files; missing numbers have their defaults

SIZES = re.compile(r"(.*) (\d+)x(\d+)x(\d+)(, \d bits.*)")  # a key of a linear kernel
FAR = 6.0  # doublings of sizes, all together, over which a configuration is not carried

Run = Callable[[Config], object]


def choose(key: str, device: torch.device, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """Return the configuration of a kernel and shape, timed if nobody has before.

    `run` launches the kernel with one. While a CUDA graph is captured nothing can be timed: the first candidate is used
    and not remembered.
    """
    if not NATIVE:
        return INTERPRETED[key.partition(" ")[0].strip(",")]
    gpu = torch.cuda.get_device_name(device)
    table = _table(gpu)
    if key not in table:
        if torch.cuda.is_current_stream_capturing():
            return candidates()[0]
        _say_once(gpu)
        table[key] = fastest(candidates(), run)[0][0]
        _keep(gpu, key, table[key])
    return table[key]


def choose_near(keys: Sequence[str], device: torch.device, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """Return a configuration as `choose` does for the first key, or that of the nearest size which is known.

    `keys`: of the kernel, and then of the nearest forms of it. So few sizes are timed.
    """
    if not NATIVE:
        return INTERPRETED[keys[0].partition(" ")[0].strip(",")]
    gpu = torch.cuda.get_device_name(device)
    for key in keys:
        if (found := _nearest(gpu, key, len(_table(gpu)))) is not None:
            return found
    return choose(keys[0], device, candidates, run)


@functools.cache
def _nearest(gpu: str, key: str, known: int) -> Config | None:
    """Return the configuration of the nearest size of the same kernel, FAR away at most, or None.

    `known`: the number of configurations of the GPU, since the answer may change with it.
    """
    table, asked = _table(gpu), SIZES.match(key)
    assert asked
    before, *sizes, after = asked.groups()
    best: tuple[float, Config | None] = (FAR, None)
    for name, config in table.items():
        other = SIZES.match(name)
        if other and (other[1], other[5]) == (before, after):
            distance = sum(abs(math.log2(int(a) / int(b))) for a, b in zip(sizes, other.groups()[1:4], strict=True))
            best = min(best, (distance, config), key=lambda item: item[0])
    return best[1]


def first_known(device: torch.device, keys: Sequence[str]) -> str:
    """Return the first of the keys that has a configuration, or the first of all.

    So a form of a kernel without one of its own takes that of the nearest form; nothing is timed anew.
    """
    if not NATIVE or device.type != "cuda":
        return keys[0]
    table = _table(torch.cuda.get_device_name(device))
    return next((key for key in keys if key in table), keys[0])


def linear_key(
    epilogue: str, rows: int, columns: int, depth: int, bits: int, two: bool, tile: int = 0, by_row: bool = False
) -> str:
    """Return the key of a linear kernel.

    `tile`: of `hopper.rows_of_tile`. Products for the Hopper kernel have candidates, and so a key, of their own.
    `by_row`: each row of the codes has a step of its own.
    """
    key = f"linear {epilogue} {bucket(rows)}x{columns}x{depth}, {bits} bits, {2 if two else 1} products"
    key += ", steps of rows" if by_row else ""
    return f"{key}, Hopper tiles of {tile} rows" if tile else key


def attention_key(sequences: int, tokens: int, head_dim: int, mode: int, hopper: bool = False) -> str:
    """Return the key of a self-attention.

    `sequences`: samples times heads; `mode`: of the probabilities, `rounding`; `hopper`: the Hopper kernel takes them.
    """
    return f"attention {bucket(sequences)}x{tokens}x{head_dim}, mode {mode}{', Hopper' if hopper else ''}"


def cross_attention_key(sequences: int, tokens: int, keys: int, head_dim: int, mode: int, biased: bool) -> str:
    """Return the key where keys are those of a context, or scores have a bias.

    Prompts of similar lengths share it.
    """
    of_keys = f"{bucket(keys)} keys{', bias' if biased else ''}"
    return f"attention {bucket(sequences)}x{tokens}x{head_dim}, mode {mode}, {of_keys}"


def with_one_pass(key: str) -> str:
    """Return the key of an attention that `kernels.hopper_flash` takes, too: files without it do not hide it."""
    return f"{key}, one pass"


def modes(mode: int) -> tuple[int, ...]:
    """Return a mode of probabilities and the mode of the nearest kernel: softmax rows are one product, as uniform."""
    return (mode, UNIFORM.value) if mode == SOFTMAX_ROW.value else (mode,)


def norm_key(rows: int, width: int, stream: torch.dtype, by_row: bool = False) -> str:
    """Return the key of `norm_quantize_kernel` for rows of `width` columns of a residual stream.

    `by_row`: to the grid of rows.
    """
    return f"norm{_suffix(stream)} {bucket(rows)}x{width}{', steps of rows' if by_row else ''}"


def quantize_key(rows: int, width: int, stream: torch.dtype, mode: int) -> str:
    """Return the key of `quantize_kernel` for rows of `width` columns."""
    return f"quantize{_suffix(stream)} {bucket(rows)}x{width}, mode {mode}"


def residual(stream: torch.dtype, gated: bool = True) -> str:
    """Return the name of the epilogue for a residual stream of a dtype."""
    return f"residual{'' if gated else '-ungated'}{_suffix(stream)}"


def activation(channels: bool) -> str:
    """Return the name of the epilogue that codes an activation; `channels`: with factors of its channels."""
    return f"gelu{CHANNELS if channels else ''}"


def epilogues(name: str) -> tuple[str, ...]:
    """Return the name of an epilogue and those of the nearest ones."""
    return (name, name.removesuffix(CHANNELS)) if name.endswith(CHANNELS) else (name,)


def _suffix(stream: torch.dtype) -> str:
    """Return the end of a name for a stream; fp16 has the configurations of bf16, since it moves the same bytes."""
    return "" if stream is torch.float32 else " bfloat16"


def float_key(rows: int, columns: int, depth: int, bits: int) -> str:
    """Return the key of a layer on float inputs.

    Few rows have a kernel of their own; tensor cores take eight at a time.
    """
    which = "float input, few rows," if rows <= FEW_ROWS else "float input"
    return f"{which} {triton.next_power_of_2(max(rows, 8))}x{columns}x{depth}, {bits} bits"


def fastest(candidates: Sequence[Config], run: Run) -> list[tuple[Config, float]]:
    """Return the candidates that work and their milliseconds, best first.

    Raises `RuntimeError` with the last reason if none works.
    """
    _compile(candidates, run)
    times: dict[Config, float] = {}
    reason: Exception | None = None
    for config in candidates:
        try:
            times[config] = milliseconds(functools.partial(run, config))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # these errors are not the configuration's fault
        except (TritonError, RuntimeError) as error:
            # Perhaps too much shared memory for this GPU. The error's frames hold tensors, and the error, in a cycle.
            reason = error.with_traceback(None)
    if not times:
        raise RuntimeError(f"no configuration of the kernel runs here: {reason}") from reason
    return sorted(times.items(), key=lambda item: item[1])


def _compile(candidates: Sequence[Config], run: Run) -> None:
    """Launch each candidate once, in threads: a kernel compiles for a second, three quarters of it outside Python.

    What fails here fails again, and is judged, where it is timed.
    """
    stream = torch.cuda.current_stream()  # a thread has its own, and its own device

    def launch(config: Config) -> None:
        with contextlib.suppress(Exception), torch.cuda.stream(stream), torch.no_grad():  # as inside an operator
            run(config)

    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        pool.map(launch, candidates)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the time of one call: the median of a few rounds of a CUDA graph of many calls.

    Launching from Python would hide a small kernel.
    """
    call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    count = min(max(1, int(ROUND_MS / max(start.elapsed_time(end), 1e-3))), 200)
    with recording() as graph:
        for _ in range(count):
            call()
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / count)
    return median(found)


def bucket(rows: int) -> int:
    """Return the rows that share a configuration, up to the next power of two."""
    return triton.next_power_of_2(max(rows, 16))


@functools.cache
def _say_once(gpu: str) -> None:
    LOG.warning(
        "compiling and timing kernels on %s, up to two minutes for a model; kept in %s where it can be written",
        gpu,
        _cache_file(gpu),
    )


@functools.cache
def _table(gpu: str) -> dict[str, Config]:
    """Return the configurations of a GPU by kernel and shape: the committed ones, and those timed here."""
    return _read(_cache_file(gpu)) | _read(tuned_file(TUNED, gpu))


def _read(path: Path) -> dict[str, Config]:
    """Return the configurations in a file.

    A damaged file is ignored, with a warning, and written anew in time.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        return {str(key): _config(numbers) for key, numbers in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is damaged and ignored: {error}", stacklevel=2)
        return {}


def _config(numbers: object) -> Config:
    if not isinstance(numbers, list) or not OLDEST <= len(numbers) <= len(Config._fields):
        raise ValueError(f"not a configuration: {numbers}")
    limit = Config._fields.index("registers")
    if any(type(n) is not int and not (i == limit and n is None) for i, n in enumerate(numbers)):
        raise ValueError(f"not a configuration: {numbers}")
    return Config(*numbers)


def _keep(gpu: str, key: str, config: Config) -> None:
    """Add a configuration to the user's file.

    Where the folder cannot be written to, the next process spends the time again.
    """
    path = _cache_file(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = {name: list(found) for name, found in _read(path).items()} | {key: list(config)}
    with contextlib.suppress(OSError):
        write_text(path, json.dumps({"configurations": kept}, indent=1) + "\n")


def _cache_file(gpu: str) -> Path:
    folder = os.environ.get("TQDIT_CACHE")
    try:
        base = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tqdit")
    except RuntimeError:  # a user without a home
        base = Path(tempfile.gettempdir()) / "tqdit"
    return base / f"triton-{triton.__version__}-{_slug(gpu)}.json"


def tuned_file(folder: Path, gpu: str) -> Path:
    """Return the file of a GPU's configurations in a folder."""
    return folder / f"{_slug(gpu)}.json"


def _slug(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())
