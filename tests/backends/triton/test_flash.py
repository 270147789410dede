"""Attention in one pass for Hopper: emulated on a CPU, compiled, and on a Hopper GPU run."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import as_projected, compiled_for_hopper, to
from operands import maker

from poisoned import PoisonedTorch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from emulated_gluon import Blocks, Emulated, Pointer

from tqdit.backends.triton import candidates, flash, hopper, launch, naming
from tqdit.backends.triton.kernels import hopper_flash
from tqdit.backends.triton.layouts import FLASH, Config, Projected, row_stride
from tqdit.errors import InputError
from tqdit.ops import one_pass, reference
from tqdit.ops.composed import probabilities, split_heads
from tqdit.ops.quantizer import dequantize, plain_codes, quantize
from tqdit.ops.schema import AttentionParams, OperandParams
from tqdit.spec import Grid

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CONFIG = Config(64, 0, 128, stages=4, blocks=2, hopper=FLASH)


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "processors", lambda device: 4)
    monkeypatch.setattr(hopper, "processors", lambda device: 4)


class OnCPU:
    """The kernel in the place of the compiled one: a launch emulates it."""

    def __getitem__(self, grid: tuple[int]):
        def run(*given: object, **options: object) -> None:
            kept = [self.emulated(x) for x in given]
            Emulated().launch(hopper_flash.hopper_flash_kernel, grid[0], *kept)

        return run

    @staticmethod
    def emulated(x: object) -> object:
        if isinstance(x, torch.Tensor):
            return Pointer(x.numpy().reshape(-1))
        if hasattr(x, "block_shape"):
            rows, columns = x.shape
            whole = np.lib.stride_tricks.as_strided(x.base.numpy(), (rows, columns), (x.strides[0], 1))
            return Blocks(whole, tuple(x.block_shape))
        return x


@pytest.fixture
def emulated(four_processors, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches run on the CPU, two programs for each of two multiprocessors."""
    found = hopper.kernels()
    assert found

    class Module:
        hopper_flash_kernel = OnCPU()
        REGISTERS = hopper_flash.REGISTERS

    monkeypatch.setattr(hopper, "kernels", lambda: found._replace(flash=Module))
    monkeypatch.setattr(flash, "torch", PoisonedTorch())
    return


class Case:
    """Operands and codes of one attention, and what the model of one pass makes of them."""

    def __init__(self, batch: int, tokens: int, keys: int | None, head_dim: int, heads: int, by_sample: bool = False):
        make, width, lead = maker(2), heads * head_dim, batch if by_sample else 1
        self.params: AttentionParams = make.attention(heads, Grid.SOFTMAX_ROW, lead)
        self.target: OperandParams = make.params(lead=lead, reach=2.0)
        self.heads, self.head_dim, self.width = heads, head_dim, width
        if keys is None:
            qkv = make.codes(batch, tokens, 3 * width)
            self.given: tuple[Projected, Projected | None] = as_projected(qkv, 3, heads), None
            self.q, self.k, self.v = split_heads(qkv, 3, heads)
        else:
            q, kv = make.codes(batch, tokens, width), make.codes(batch, keys, 2 * width)
            self.given = as_projected(q, 1, heads), as_projected(kv, 2, heads)
            (self.q,), (self.k, self.v) = split_heads(q, 1, heads), split_heads(kv, 2, heads)

    def scores(self) -> torch.Tensor:
        q, k = dequantize(self.q, self.params.query).double(), dequantize(self.k, self.params.key).double()
        return q @ k.transpose(-1, -2) * self.head_dim**-0.5

    def modelled(self) -> tuple[torch.Tensor, torch.Tensor]:
        return one_pass.attend(self.scores(), self.params.softmax, self.v, self.params.value)

    def real(self) -> torch.Tensor:
        return self.scores().softmax(-1) @ dequantize(self.v, self.params.value).double()

    def run(self, config: Config, device: torch.device = CPU, coded: bool = False) -> torch.Tensor:
        operands = (*self.params.projections, self.params.softmax, *((self.target,) if coded else ()))
        given = [None if x is None else x._replace(codes=x.codes.to(device)) for x in self.given]
        found = launch.attend(*given, None, self.heads, tuple(to(device, p) for p in operands), config)
        return found[..., : self.width].cpu()

    def check(self, config: Config, device: torch.device = CPU) -> None:
        """The result is the model's but for ties and roundings of sums, and within the model's bound of the softmax.

        Powers that are rounded to fp16 first have more ties.
        """
        found = self.run(config, device)
        by_head = found.double().unflatten(-1, (self.heads, -1)).transpose(1, 2)
        modelled, bound = self.modelled()
        assert (by_head - modelled).norm() <= (1e-3 if config.piece else 3e-4) * modelled.norm()
        scale = dequantize(self.v, self.params.value).abs().amax().double()
        assert ((by_head - self.real()).abs() <= bound * (1 + 1e-3) + 1e-3 * scale).all()
        if self.k.shape[2] <= one_pass.BLOCK:
            p = plain_codes(probabilities(self.scores().float(), self.params.softmax), self.params.softmax)
            exact = reference.values(p, self.params.softmax, self.v, self.params.value)
            assert (exact == by_head.float()).double().mean() > (
                0.9 if config.piece else 0.95
            )  # but for ties of a code of the row
        codes = quantize(found, self.target)
        assert torch.equal(self.run(config, device, coded=True), codes)


CASES = [
    (1, 128, None, 72, 2, True), (2, 80, None, 72, 1, True), (1, 304, None, 72, 1, False), (1, 144, None, 64, 2, False),
    (1, 144, None, 96, 1, False), (1, 160, None, 128, 1, False), (1, 160, None, 80, 1, False),
    (3, 16, None, 40, 1, True),
    (2, 70, 272, 72, 1, False), (1, 200, 16, 64, 2, True), (1, 640, None, 72, 1, False),
]  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, CONFIG._replace(stages=2)], ids=["four stages", "two stages"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(emulated, case: tuple, config: Config) -> None:
    Case(*case).check(config)


def test_where_no_score_is_higher_than_in_the_first_block_it_is_the_reference(emulated) -> None:
    """Codes and sums are; no sum has ever shrunk."""
    case = Case(1, 64, 512, 72, 2)
    case.k[:, :, 0] = case.k[:, :, 0].sign() * 0 + torch.where(case.q.float().mean(2) >= 0, 127, -128).to(torch.int8)
    scores = case.scores()
    first = scores[..., : one_pass.BLOCK].amax(-1) == scores.amax(-1)
    kv = torch.stack([case.k, case.v]).permute(1, 3, 0, 2, 4).flatten(2)
    case.given = case.given[0], as_projected(kv, 2, 2)
    p = plain_codes(probabilities(scores.float(), case.params.softmax), case.params.softmax)
    exact = reference.values(p, case.params.softmax, case.v, case.params.value).transpose(1, 2)
    same = (case.run(CONFIG).unflatten(-1, (2, -1)) == exact).all(-1).transpose(1, 2)
    assert first.float().mean() > 0.2
    assert same[first].float().mean() > 0.9  # but for ties


def test_codes_that_are_rounded_to_fp16_are_within_an_eighth_of_a_step_more(emulated) -> None:
    case = Case(1, 64, 256, 72, 1)
    half, single = case.run(CONFIG._replace(piece=1)), case.run(CONFIG)
    _, bound = case.modelled()
    difference = (half - single).unflatten(-1, (1, -1)).transpose(1, 2).double().abs()
    assert difference.max() > 0
    assert (difference <= 2.3 * bound).all()  # a code may be the next one


@pytest.mark.long
def test_it_compiles(four_processors, tmp_path: Path) -> None:
    """For sm_90a: no products one after another, few spills, within the shared memory that its sizes reckon with."""
    asked = [
        (head_dim, list(config._replace(stages=8)), by_sample, bits)
        for head_dim in (64, 72, 96, 128)
        for config, by_sample, bits in ((CONFIG, False, 8), (CONFIG._replace(piece=1), True, 0))
    ]
    found = compiled_for_hopper("flash", asked, tmp_path)
    assert len(found) == 8
    for kernel in found:
        assert kernel["shared"] <= hopper.SHARED_MEMORY - 1024, kernel
        assert kernel["spilled"] <= 512, kernel  # bytes, of the warps that sum
        assert not any("serialized" in warning for warning in kernel["warnings"]), kernel


@pytest.mark.parametrize(
    ("config", "keys", "head_dim", "takes"),
    [
        (CONFIG, 256, 72, True), (CONFIG, 16384, 128, True), (CONFIG, 1040, 80, True), (CONFIG, 100, 72, False),
        (CONFIG, 256, 36, False), (CONFIG, 256, 160, False), (CONFIG._replace(block_k=64), 256, 72, False),
        (CONFIG._replace(blocks=1), 256, 72, False), (CONFIG._replace(stages=1), 256, 72, False),
        (CONFIG._replace(block_m=128), 256, 72, False),
    ],
)  # fmt: skip
def test_what_it_takes(four_processors, config: Config, keys: int, head_dim: int, takes: bool) -> None:
    """Whole sixteens of keys; blocks of one size, since the blocks decide the codes; heads of up to 128 channels."""
    assert flash.supports(config, CPU, keys, head_dim) == takes


def test_it_is_offered_for_many_keys_and_where_somebody_asks_for_it(
    four_processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDIT_ONE_PASS", raising=False)
    assert candidates.hopper_flash(CPU, 256, 72) == []
    assert candidates.hopper_flash(CPU, 2048, 72) == candidates.hopper_flash(CPU, 4096, 72) != []
    assert candidates.hopper_attention(CPU, 2048, 72, False, True) == []  # its place is not taken
    monkeypatch.setenv("TQDIT_ONE_PASS", "0")
    assert candidates.hopper_flash(CPU, 4096, 72) == []
    monkeypatch.setenv("TQDIT_ONE_PASS", "1")
    found = candidates.hopper_flash(CPU, 256, 72)
    assert found == [CONFIG._replace(stages=8)]
    assert candidates.hopper_flash(CPU, 100, 72) == []
    key = naming.attention_key(32, 256, 72, 6, True)
    assert naming.with_more(key, found) == f"{key}, one pass"


def test_no_other_device_runs_it() -> None:
    assert not flash.supports(CONFIG, CPU, 256, 72)
    with pytest.raises(InputError, match="compute capability"):
        Case(1, 64, None, 72, 1).run(CONFIG)


def test_it_needs_softmax_rows(four_processors) -> None:
    case = Case(1, 64, None, 72, 1)
    case.params = maker(1).attention(1, Grid.UNIFORM)
    with pytest.raises(InputError, match="softmax rows"):
        case.run(CONFIG)


def test_a_launch_gives_every_parameter_of_the_kernel_its_value(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = inspect.signature(hopper_flash.hopper_flash_kernel.fn)
    launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]):
            return lambda *given, **options: launches.append((grid, parameters.bind(*given).arguments, options))

    monkeypatch.setattr(hopper.kernels().flash, "hopper_flash_kernel", Kernel())
    case = Case(3, 70, 272, 72, 2, True)
    case.run(CONFIG, coded=True)
    ((grid, given, options),) = launches
    assert list(given) == list(parameters.parameters)
    sizes = {"sequences": 6, "heads": 2, "N": 70, "KEYS": 272, "D": 72, "D_FIRST": 64, "D_REST": 32, "V_REST": 8,
             "V_PAD": 16, "BITS": 8, "TARGET_BITS": 8, "STAGES": 4, "BK": one_pass.BLOCK, "HALF": False}  # fmt: skip
    assert {name: given[name] for name in sizes} == sizes
    shapes = {name: list(given[name].block_shape) for name in ("q", "q_rest", "k", "k_rest", "v", "v_rest")}
    assert shapes == {"q": [64, 64], "q_rest": [64, 32], "k": [128, 64], "k_rest": [128, 32], "v": [64, 128],
                      "v_rest": [8, 128]}  # fmt: skip
    tables = (*case.params.projections, case.target)
    assert all(given[n] is p.table for n, p in zip(("query", "key", "value", "target"), tables, strict=True))
    assert given["STRIDES"] == tuple(map(row_stride, tables))
    assert (grid, options["num_warps"]) == ((4,), hopper_flash.WARPS.value)  # no more programs than multiprocessors


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG._replace(stages=8), CONFIG._replace(piece=1)], ids=["four stages", "many stages", "fp16"]
)
@pytest.mark.parametrize("case", [*CASES, (2, 1024, None, 72, 3, False), (1, 2048, None, 128, 2, False)], ids=str)
def test_on_hopper(monkeypatch: pytest.MonkeyPatch, case: tuple, config: Config) -> None:
    monkeypatch.setattr(flash, "torch", PoisonedTorch())
    found = Case(*case)
    found.check(config, CUDA)
    first = found.run(config, CUDA)
    assert all(torch.equal(found.run(config, CUDA), first) for _ in range(3))
