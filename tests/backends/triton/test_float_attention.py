"""Attention of dequantized codes in bf16: how far it is from that in fp64, and who hears of it."""

import pytest
import torch
from layouts import as_projected, to
from operands import maker

pytest.importorskip("triton")

from tqdit.backends.triton import deviations, float_attention, launch, naming, operators, tuning
from tqdit.backends.triton.backend import TritonBackend
from tqdit.backends.triton.layouts import FLASH, NATIVE, Config
from tqdit.ops.composed import split_heads
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = float_attention.CONFIG if NATIVE else float_attention.CONFIG._replace(block_m=32, block_n=64)
HALF_STEP = 2.0**-8  # by which rounding to bf16 changes a number, relatively
CASES = [  # samples, queries, keys of a context or None, head_dim, heads, time groups by sample
    (2, 70, None, 72, 3, True), (1, 48, None, 40, 2, False), (2, 20, 77, 72, 2, True), (1, 33, 64, 64, 1, False),
]  # fmt: skip


class Case:
    """Codes and operands of one attention."""

    def __init__(self, batch: int, tokens: int, keys: int | None, head_dim: int, heads: int, by_sample: bool):
        make, width, lead = maker(3), heads * head_dim, batch if by_sample else 1
        self.params, self.target = make.attention(heads, Grid.SOFTMAX_ROW, lead), make.params(lead=lead, reach=2.0)
        self.heads, self.width = heads, width
        if keys is None:
            qkv = make.codes(batch, tokens, 3 * width)
            self.given = as_projected(qkv, 3, heads), None
            self.codes = split_heads(qkv, 3, heads)
        else:
            q, kv = make.codes(batch, tokens, width), make.codes(batch, keys, 2 * width)
            self.given = as_projected(q, 1, heads), as_projected(kv, 2, heads)
            self.codes = *split_heads(q, 1, heads), *split_heads(kv, 2, heads)

    def run(self, coded: bool) -> torch.Tensor:
        operands = (*self.params.projections, self.params.softmax, *((self.target,) if coded else ()))
        given = [None if x is None else x._replace(codes=x.codes.to(DEVICE)) for x in self.given]
        found = launch.attend(*given, None, self.heads, tuple(to(DEVICE, p) for p in operands), CONFIG)
        return found[..., : self.width].cpu()

    def real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax(Q K^T) V in fp64, and a bound of what rounding operands, powers and the result to bf16 can do."""
        q, k, v = (dequantize(x, p).double() for x, p in zip(self.codes, self.params.projections, strict=True))
        factor, u = q.shape[-1] ** -0.5, HALF_STEP
        p = (q @ k.transpose(-1, -2) * factor).softmax(-1)
        of_scores = (2 * u + u * u) * factor * (q.abs() @ k.abs().transpose(-1, -2)).amax(-1, keepdim=True)
        of_sums = (2 * of_scores).exp() * (1 + u) ** 2 - 1
        real, size = p @ v, p @ v.abs()
        bound = of_sums * size * (1 + u) + u * real.abs() + 1e-5 * size
        return tuple(x.transpose(1, 2).flatten(2) for x in (real, bound))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_attention_of_dequantized_codes(case: tuple) -> None:
    made = Case(*case)
    found, (real, bound) = made.run(coded=False), made.real()
    assert found.dtype is torch.float32
    assert ((found.double() - real).abs() <= bound).all()
    assert (found.double() - real).norm() <= 0.02 * real.norm()
    assert torch.equal(made.run(coded=True), quantize(found, made.target))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, None]]:
    found: dict[int, dict[str, None]] = {kind: {} for kind in deviations.KINDS}
    monkeypatch.setattr(deviations, "_TAKEN", found)
    return found


def attended(case: Case) -> torch.Tensor:
    moved = case.params._replace(**{n: to(DEVICE, p) for n, p in case.params._asdict().items() if n != "heads"})
    projected = case.given[0]._replace(codes=case.given[0].codes.to(DEVICE))
    return TritonBackend().attend(projected, moved, to(DEVICE, case.target)).cpu()


def test_a_report_says_which_sizes_took_it(taken: dict[int, dict[str, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = Case(*CASES[0]), []

    def chosen(keys: list[str], device: torch.device, candidates: object, run: object) -> Config:
        asked.extend(keys)
        return CONFIG

    monkeypatch.setenv("TQDIT_BF16_ATTENTION", "1")
    monkeypatch.setattr(tuning, "choose", chosen)
    assert TritonBackend().kernel("scores") == "fused attention, int8"
    found = attended(case)
    assert torch.equal(found[..., : case.width], case.run(coded=True))
    assert [key.endswith(", bf16") for key in asked] == [True]
    said = "; in bf16, of dequantized codes, for 70 x 70 x 72 (queries, keys, head_dim)"
    assert TritonBackend().deviating() == said
    assert TritonBackend().kernel("scores") == "fused attention, int8"  # by which runs are recorded


@pytest.mark.parametrize("wanted", ["", "1"])
def test_it_is_a_candidate_where_somebody_asks_for_it(
    wanted: str, taken: dict[int, dict[str, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the configuration of integers that is known, so that both are timed."""
    case, asked = Case(*CASES[0]), []
    best, ordinary = Config(64, 0, 128, stages=7), Config(32, 0, 64)

    def chosen(keys: list[str], device: torch.device, candidates, run: object) -> Config:
        asked.extend(candidates())
        return ordinary

    monkeypatch.setenv("TQDIT_BF16_ATTENTION", wanted)
    monkeypatch.setattr(tuning, "choose", chosen)
    monkeypatch.setattr(tuning, "known", lambda keys, device, candidates: best)
    attended(case)
    assert (asked[:2] == [best, float_attention.CONFIG]) == (wanted == "1")
    assert (float_attention.CONFIG in asked) == (wanted == "1")
    assert not any(taken.values())


def test_one_pass_is_named_too(taken: dict[int, dict[str, None]]) -> None:
    assert deviations.described() == ""
    for sizes in ((4096, 4096, 72), (4096, 2048, 72), (4096, 4096, 72)):
        deviations.note(CONFIG._replace(hopper=FLASH), *sizes)
    deviations.note(CONFIG._replace(hopper=1), 256, 256, 72)
    said = "; in one pass over the keys for 4096 x 4096 x 72, 4096 x 2048 x 72 (queries, keys, head_dim)"
    assert TritonBackend().deviating() == said


def test_no_other_key_has_it() -> None:
    key = naming.attention_key(32, 256, 72, 6)
    assert naming.with_more(key, [float_attention.CONFIG]) == f"{key}, bf16"
    assert operators.candidates.attention(32, 256).count(float_attention.CONFIG) == 0
