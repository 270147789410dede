"""Which blocks and schedule each kernel runs with: committed for GPUs we measured, found once and kept elsewhere.

A configuration changes speed alone, but for the last bits of LayerNorm and of layers on float inputs. Where none is
committed the first call of every kernel and shape times the candidates (seconds), and keeps the best in the user's
cache folder (TQDIT_CACHE).
"""

import contextlib
import functools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import triton
from triton.errors import TritonError

from tqdit.backends.triton import hopper
from tqdit.backends.triton.launch import FEW_ROWS
from tqdit.backends.triton.layouts import NATIVE, Config
from tqdit.capture import recording
from tqdit.files import write_text

LOG = logging.getLogger(__name__)
TUNED = Path(__file__).with_name("tuned")
INTERPRETED = {
    "linear": Config(32, 32, 128), "attention": Config(32, 0, 64), "float": Config(16, 32, 64),
    "norm": Config(2, 0, 0, blocks=2),
}  # fmt: skip
ROUNDS, ROUND_MS = 5, 4
OLDEST = 9  # numbers of a configuration in the oldest files that are read; what they lack has its default
FEW_TILES = 4096  # rows: below, large tiles leave multiprocessors without work

Run = Callable[[Config], object]


def choose(key: str, device: torch.device, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """The configuration of a kernel and shape, timed if nobody has before. `run` launches the kernel with one.

    While a CUDA graph is captured nothing can be timed: the first candidate is used and not remembered.
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


def linear_key(epilogue: str, rows: int, columns: int, depth: int, bits: int, two: bool, tile: int = 0) -> str:
    """`tile`: of `hopper.rows_of_tile`. What the Hopper kernel may run has candidates, and so a key, of its own."""
    key = f"linear {epilogue} {bucket(rows)}x{columns}x{depth}, {bits} bits, {2 if two else 1} products"
    return f"{key}, Hopper tiles of {tile} rows" if tile else key


def attention_key(sequences: int, tokens: int, head_dim: int, mode: int, hopper: bool = False) -> str:
    """`sequences`: samples times heads; `mode`: of the probabilities, `rounding`; `hopper`: that kernel takes them."""
    return f"attention {bucket(sequences)}x{tokens}x{head_dim}, mode {mode}{', Hopper' if hopper else ''}"


def norm_key(rows: int, width: int, stream: torch.dtype) -> str:
    return f"norm{_suffix(stream)} {bucket(rows)}x{width}"


def residual(stream: torch.dtype) -> str:
    """The name of that epilogue for a residual stream of a dtype."""
    return f"residual{_suffix(stream)}"


def _suffix(stream: torch.dtype) -> str:
    return "" if stream is torch.float32 else f" {str(stream).removeprefix('torch.')}"


def norm_candidates(rows: int, width: int) -> list[Config]:
    """Where there are many rows, a program takes many of one sample, whose shift and scale its registers hold: a row or
    two at a time, by as few warps as can hold them. Or it takes few and holds nothing, so that more programs run.
    """
    one = Config(1, 0, 0, warps=triton.next_power_of_2(triton.cdiv(width, 1536)))
    two, four = Config(2, 0, 0, warps=2), Config(4, 0, 0, warps=4)
    if rows <= FEW_TILES:
        held, unheld = [two, four, one], [two, four, one, one._replace(warps=4)]
    else:
        most = one._replace(block_m=max(1, min(16, 4096 // triton.next_power_of_2(width))))
        held = [one._replace(blocks=8), one._replace(blocks=16), one._replace(blocks=4)]
        held += [one._replace(blocks=8, stages=4), most._replace(blocks=8, stages=2)]
        held += [most._replace(blocks=4), most._replace(blocks=8), two._replace(blocks=8), four._replace(blocks=4)]
        unheld = [one, most, one._replace(blocks=4), two]
    return list(dict.fromkeys(held + [config._replace(stages=1) for config in unheld]))


def float_key(rows: int, columns: int, depth: int, bits: int) -> str:
    """Few rows have a kernel of their own; tensor cores take eight at a time."""
    which = "float input, few rows," if rows <= FEW_ROWS else "float input"
    return f"{which} {triton.next_power_of_2(max(rows, 8))}x{columns}x{depth}, {bits} bits"


def fastest(candidates: Sequence[Config], run: Run) -> list[tuple[Config, float]]:
    """Candidates that work and their milliseconds, best first. `RuntimeError` with the last reason if none does."""
    times: dict[Config, float] = {}
    reason: Exception | None = None
    for config in candidates:
        try:
            times[config] = milliseconds(functools.partial(run, config))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # says nothing of the configuration
        except (TritonError, RuntimeError) as error:
            reason = error  # too much shared memory for this GPU, say
    if not times:
        raise RuntimeError(f"no configuration of the kernel runs here: {reason}") from reason
    return sorted(times.items(), key=lambda item: item[1])


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, the median of a few rounds of a CUDA graph of many: launching from Python would hide a small one."""
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
    """Rows that share a configuration: up to the next power of two."""
    return triton.next_power_of_2(max(rows, 16))


def linear_candidates(rows: int, two: bool, bits: int) -> list[Config]:
    """Tiles that fill a GPU: large ones where there are many rows, small ones where there are few."""
    if two:
        found = [
            Config(64, 128, 128, 8, 4, 3, 64), Config(64, 128, 128, 8, 4, 4, 64), Config(128, 128, 128, 8, 8, 3, 64),
            Config(128, 128, 128, 8, 8, 4, 32),
        ]  # fmt: skip
    else:
        found = [
            Config(128, 128, 128, 8, 4, 3, 64), Config(128, 128, 128, 8, 4, 3, 32),
            Config(128, 128, 128, 8, 4, 2, 32, 168), Config(128, 128, 64, 8, 4, 4, 32, 168),
        ]  # fmt: skip
    if rows <= FEW_TILES:
        small = [
            Config(64, 64, 128, 8, 4, 4, 32), Config(64, 64, 128, 8, 4, 3, 64, 128), Config(64, 128, 128, 8, 4, 4, 32),
            Config(128, 64, 128, 8, 4, 4, 32), Config(64, 128, 256, 8, 4, 3, 32), Config(64, 64, 256, 8, 4, 3, 32),
            Config(64, 32, 256, 8, 4, 4, 32), Config(64, 64, 256, 8, 4, 4, 32),
        ]  # fmt: skip
        found = small + found[:2]
    return found if bits == 8 else [c for c in found if c.block_k == 128]


def hopper_candidates(epilogue: str, rows: int, columns: int, tile: int) -> list[Config]:
    """Those of `kernels.hopper` for a product; `tile`: of `hopper.rows_of_tile`, none if it is 0.

    As many stages as fit beside what the stores pass through shared memory, or the blocks of the residual stream: up to
    five of those beside four stages, three beside five.
    """
    residual = epilogue.startswith("residual")
    large = [(4, 32), (5, 32)] if residual else [(6, 64), (6, 32)]
    found = [Config(128, 128, 128, stages=stages, piece=piece, hopper=1) for stages, piece in large]
    if rows <= FEW_TILES or tile < 128:
        small = [(64, 128, 8), (128, 64, 8), (64, 64, 8), (64, 64, 12)]
        found += [Config(m, n, 128, stages=stages, piece=32 if residual else 64, hopper=1) for m, n, stages in small]
    width = columns // 3 if epilogue == "heads" else columns
    return [config for config in found if hopper.takes(config, tile, width)]


def attention_candidates(sequences: int, tokens: int) -> list[Config]:
    """All keys at once up to 256, by several blocks of rows where there are many sequences; or tiles of keys."""
    tiles = [
        Config(64, 0, 128, warps=4, stages=3), Config(64, 0, 128, warps=4, stages=2, registers=128),
        Config(64, 0, 64, warps=4, stages=3), Config(64, 0, 64, warps=4, stages=2, registers=128),
    ]  # fmt: skip
    if tokens > 256:
        return [*tiles, Config(128, 0, 128, warps=8, stages=3)]
    keys = max(32, triton.next_power_of_2(tokens))
    found = [Config(64, 0, keys, warps=4, stages=stages) for stages in (2, 1)]
    found.append(Config(128, 0, keys, warps=8, stages=2))
    if sequences >= 256 and tokens > 64:
        several = [c._replace(blocks=4) for c in found[:2]]
        found = several + [several[0]._replace(registers=limit) for limit in (168, 200)] + found + tiles[:2]
    return found


@functools.cache
def hopper_attention_candidates(device: torch.device, tokens: int, head_dim: int, two: bool) -> list[Config]:
    """Those of `kernels.hopper_attention`: a head's rows together, or in parts where there are few heads.

    `two`: products of the probabilities, which take the registers of scores. Keys that fill two slots are multiplied
    once; for more, sixteen warps hide each other's waiting and have few registers.
    """
    if tokens <= 256:
        found = [Config(64, rows, bk, stages=4, hopper=1) for bk in (128, 64) for rows in (0, 64)]
        found.append(Config(128, 0, 128, stages=8, hopper=1))
    else:
        found = [Config(128, rows, 128, stages=8, blocks=2 - two, hopper=1) for rows in (0, 128)]
        if not two:
            found[:0] = [Config(256, rows, 64, stages=16, hopper=1) for rows in (0, 256)]
        found += [c._replace(blocks=1) for c in found if c.blocks == 2 and tokens // c.block_k % 2]
    return [config for config in found if hopper.attends(config, device, tokens, head_dim)]


def float_candidates(rows: int, columns: int) -> list[Config]:
    """Tiles of rows as narrow as tensor cores take them where there are few, so that reading the weight is all there
    is; small tiles of both where one of them is short, for more programs; for few rows also without tensor cores.
    """
    if rows <= 8:
        found = [
            Config(8, 128, 64, warps=4, stages=4), Config(8, 256, 64, warps=4, stages=4),
            Config(8, 128, 64, warps=2, stages=4), Config(8, 32, 128, warps=2, stages=4),
        ]  # fmt: skip
        if rows <= FEW_ROWS:
            found += [Config(0, bn, bk, warps=4) for bn, bk in ((32, 128), (8, 512), (4, 1024))]
        return found
    if rows <= 16:
        return [
            Config(16, 128, 64, warps=2, stages=4), Config(16, 64, 64, warps=2, stages=4),
            Config(16, 128, 64, warps=4, stages=4), Config(16, 128, 64, warps=2, stages=6),
            Config(16, 32, 128, warps=2, stages=4), Config(8, 32, 128, warps=2, stages=4),
        ]  # fmt: skip
    if rows > FEW_TILES:
        if columns <= 32:
            return [
                Config(64, 32, 64, warps=4, stages=3), Config(64, 32, 64, warps=4, stages=4),
                Config(64, 32, 128, warps=4, stages=2), Config(128, 32, 64, warps=8, stages=3),
                Config(32, 32, 128, warps=4, stages=3),
            ]  # fmt: skip
        return [
            Config(64, 128, 32, warps=4, stages=3), Config(64, 128, 64, warps=4, stages=3),
            Config(64, 64, 64, warps=4, stages=3), Config(64, 128, 64, warps=8, stages=3),
            Config(64, 256, 32, warps=4, stages=3),
        ]  # fmt: skip
    small = [
        Config(16, 32, 128, warps=2, stages=4), Config(8, 32, 128, warps=2, stages=4),
        Config(16, 32, 128, warps=4, stages=4),
    ]  # fmt: skip
    if columns <= 32:
        return [*small, Config(8, 32, 256, warps=2, stages=3), Config(64, 32, 64, warps=4, stages=3)]
    return [
        Config(64, 128, 64, warps=4, stages=3), Config(64, 256, 64, warps=4, stages=2),
        Config(64, 256, 32, warps=4, stages=3), Config(64, 64, 64, warps=4, stages=3),
        Config(32, 64, 64, warps=2, stages=4), *small,
    ]  # fmt: skip


@functools.cache
def _say_once(gpu: str) -> None:
    LOG.warning(
        "timing kernels on %s, up to two minutes for a model; kept in %s where it can be written", gpu, _cache_file(gpu)
    )


@functools.cache
def _table(gpu: str) -> dict[str, Config]:
    """Configurations of a GPU by kernel and shape: the committed ones, and those found here."""
    return _read(_cache_file(gpu)) | _read(tuned_file(TUNED, gpu))


def _read(path: Path) -> dict[str, Config]:
    """The configurations in a file; one that is damaged is ignored, with a warning, and written anew in time."""
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
    """Add one to the user's file; a folder that cannot be written to costs the next process the time again."""
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
    return folder / f"{_slug(gpu)}.json"


def _slug(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())
