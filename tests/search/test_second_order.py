"""Second-order rounding: the paper's codes, never worse than nearest in any row, the same on every machine."""

import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tqdit.errors import InputError
from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.search import second_order
from tqdit.search.second_order import _Factor, _rounded, hessian, round_weights, scaled_codes

FACTORS = uniform.factors(0.4, 1.0, 25)


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs of few directions, some channels larger than others, as those of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(max(1, features // 4), features, generator=generator)
    x = torch.randn(rows, len(mixing), generator=generator) @ mixing
    x += 0.3 * torch.randn(rows, features, generator=generator)
    return x * torch.rand(features, generator=generator).add(0.1).square()


def random_weight(out: int, features: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def minmax(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return uniform.minmax_symmetric(weight.abs().amax(1), bits, "w")


def nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return uniform.quantize(weight, scale[:, None], 0, bits)


def loss(weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The definition, without the module's helpers: e H e^T of every row."""
    e = (codes * scale[:, None].double()) - weight.double()
    return torch.einsum("oi,ij,oj->o", e, h, e)


def as_in_the_paper(
    weight: torch.Tensor, scale: torch.Tensor, h: torch.Tensor, bits: int, damping: float, act_order: bool
) -> torch.Tensor:
    """Algorithm 1 without blocks: the inverse's Cholesky factor, and an update of all columns that are left."""
    fmt = IntFormat(bits)
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(len(h))
    damped = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, codes = weight.double()[:, order], torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(len(h)):
        codes[:, j] = (left[:, j] / scale.double()).round().clamp(fmt.qmin, fmt.qmax)
        error = (left[:, j] - codes[:, j] * scale.double()) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_hessian_is_the_mean_of_two_parts_of_trace_one(mix: float, monkeypatch) -> None:
    monkeypatch.setattr(second_order, "ROWS", 7)
    x, weight = correlated(30, 6), torch.rand(30)
    plain = sum(torch.outer(row, row) for row in x.double())
    weighted = sum(w * torch.outer(row, row) for row, w in zip(x.double(), weight.double(), strict=True))
    h = hessian(x, weight, mix)
    expected = (1 - mix) * plain / plain.trace() + mix * weighted / weighted.trace()
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-15)
    assert h.dtype == torch.float64
    assert torch.equal(h, h.t())
    assert h.trace().item() == pytest.approx(1)


def test_rows_without_weights_or_with_zeros_leave_the_plain_part() -> None:
    x = correlated(30, 6)
    plain = hessian(x, torch.ones(30), mix=0.0)
    for weight in (None, torch.zeros(30)):
        assert torch.allclose(hessian(x, weight, mix=1.0), plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_the_paper(bits: int, act_order: bool) -> None:
    weight, h = random_weight(24, 40), hessian(correlated(200, 40))
    scale = 0.8 * minmax(weight, bits)  # some weights are clipped
    expected = as_in_the_paper(weight, scale, h, bits, 0.01, act_order)
    codes = round_weights(weight, scale, h, bits, act_order=act_order, block=16)
    better = loss(weight, scale, expected, h) < loss(weight, scale, nearest(weight, scale, bits), h)
    assert better.sum() > 20  # else nothing is compared
    assert torch.equal(codes[better].double(), expected[better])


def test_no_codes_are_better_than_the_best_of_all() -> None:
    """Brute force over all codes of 2 bits: the optimum bounds GPTQ from below, and nearest from above."""
    weight, h = random_weight(12, 5), hessian(correlated(50, 5))
    scale = minmax(weight, 2)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
    best = torch.stack([loss(weight, scale, codes.expand(12, -1), h) for codes in every]).amin(0)
    found = loss(weight, scale, round_weights(weight, scale, h, 2), h)
    simple = loss(weight, scale, nearest(weight, scale, 2), h)
    assert (best <= found + 1e-12).all()
    assert (found <= simple).all()
    assert found.sum() - best.sum() < 0.5 * (simple.sum() - best.sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "factor"), [(2, 0.5), (4, 0.3), (4, 1.0), (6, 1.0), (8, 0.9)])
def test_no_row_is_worse_than_nearest(bits: int, factor: float, act_order: bool) -> None:
    weight, h = random_weight(64, 48), hessian(correlated(500, 48))
    scale = factor * minmax(weight, bits)
    codes = round_weights(weight, scale, h, bits, act_order=act_order)
    fmt = IntFormat(bits)
    assert codes.dtype == torch.int8
    assert fmt.qmin <= int(codes.min()) <= int(codes.max()) <= fmt.qmax
    after, before = (loss(weight, scale, c, h) for c in (codes, nearest(weight, scale, bits)))
    assert (after <= before * (1 + 1e-12)).all()
    assert after.sum() < 0.9 * before.sum()


def test_a_row_that_gains_nothing_keeps_the_nearest_codes() -> None:
    """Clipping at a tenth of the range moves so much error that some rows would lose by it."""
    weight, h = random_weight(64, 48), hessian(correlated(500, 48))
    scale = 0.1 * minmax(weight, 2)
    greedy = as_in_the_paper(weight, scale, h, 2, 0.01, True)
    worse = loss(weight, scale, greedy, h) > loss(weight, scale, nearest(weight, scale, 2), h)
    assert worse.any()
    codes = round_weights(weight, scale, h, 2)
    assert torch.equal(codes[worse], nearest(weight, scale, 2)[worse])


def test_columns_without_products_are_rounded_to_nearest() -> None:
    weight, scale = random_weight(8, 16), torch.full((8,), 0.3)
    for h in (torch.diag(torch.rand(16, dtype=torch.float64)), torch.zeros(16, 16, dtype=torch.float64)):
        assert torch.equal(round_weights(weight, scale, h, 4), nearest(weight, scale, 4))


def test_dead_inputs_and_fewer_rows_than_columns() -> None:
    x = correlated(10, 40)
    x[:, [0, 7, 39]] = 0
    weight, h = random_weight(16, 40), hessian(x, torch.rand(10))
    scale = minmax(weight, 4)
    codes, simple = round_weights(weight, scale, h, 4), nearest(weight, scale, 4)
    assert torch.equal(codes[:, [0, 7, 39]], simple[:, [0, 7, 39]])
    assert loss(weight, scale, codes, h).sum() < 0.5 * loss(weight, scale, simple, h).sum()
    dead = hessian(torch.zeros(10, 40), torch.rand(10))
    assert torch.equal(round_weights(weight, scale, dead, 4), simple)


@pytest.mark.parametrize("block", [1, 5, 40, 1000])
def test_the_size_of_a_block_changes_no_code(block: int) -> None:
    weight, h = random_weight(16, 40), hessian(correlated(100, 40))
    scale = minmax(weight, 4)
    assert torch.equal(round_weights(weight, scale, h, 4, block=block), round_weights(weight, scale, h, 4, block=8))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def coded(x: torch.Tensor, row_weight: torch.Tensor, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the codes of a layer that is large enough for threads to share its products."""
    weight = random_weight(192, 320).to(device)
    h = hessian(x.to(device), row_weight.to(device))
    scale, codes = scaled_codes(weight, h, 4, FACTORS)
    return scale.cpu(), codes.cpu()


def test_codes_do_not_depend_on_threads(two_threads) -> None:
    x, row_weight = correlated(3000, 320), torch.rand(3000)
    shared = coded(x, row_weight)
    torch.set_num_threads(1)
    alone = coded(x, row_weight)
    assert all(map(torch.equal, shared, alone))


def test_codes_do_not_depend_on_the_order_of_rows() -> None:
    x, row_weight = correlated(3000, 320), torch.rand(3000)
    order = torch.randperm(3000)
    assert not torch.equal(hessian(x, row_weight), hessian(x[order], row_weight[order]))  # the sums do
    assert all(map(torch.equal, coded(x, row_weight), coded(x[order], row_weight[order])))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codes_of_another_device_differ_where_scales_round_differently() -> None:
    x, row_weight = correlated(3000, 320), torch.rand(3000)
    (scale, codes), (other_scale, other_codes) = coded(x, row_weight), coded(x, row_weight, "cuda")
    torch.testing.assert_close(other_scale, scale, rtol=1e-6, atol=0.0)  # a GPU divides by a constant its own way
    assert (codes != other_codes).double().mean() < 1e-3


class LiveBytes(TorchDispatchMode):
    """Measure the most bytes that tensors take at once which operations inside return; `given` are not counted."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(tensor) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        alive = {ref: tensor for ref in self.made if (tensor := ref()) is not None}
        self.made = list(alive)
        sizes = {(own := tensor.untyped_storage())._cdata: own.nbytes() for tensor in alive.values()}
        self.peak = max(self.peak, sum(size for storage, size in sizes.items() if storage not in self.given))
        return result


def flipped_factor(h: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The feedback of a Hessian, with a new matrix for each step."""
    damped = h[order.flip(0)][:, order.flip(0)]
    damped.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(damped).flip(0, 1)
    return (upper / upper.diagonal()).triu(1)


@pytest.mark.parametrize("features", [1, 2, 7, 320])
def test_a_factor_in_place_is_that_of_new_matrices_to_the_last_bit(features: int, monkeypatch) -> None:
    monkeypatch.setattr(second_order, "REVERSED", 1000)  # several parts, and one that is shorter
    h = hessian(correlated(600, features), torch.rand(600))
    before = h.clone()
    factor = _Factor.of(h, True, 0.01, "x")
    expected = flipped_factor(h, factor.order, 0.01)
    assert torch.equal(factor.feedback, expected)
    assert factor.feedback.stride() == torch.linalg.cholesky(h).stride()  # products of other strides may differ
    assert torch.equal(h, before)


def test_a_factor_takes_one_matrix_beside_the_hessian(monkeypatch) -> None:
    monkeypatch.setattr(second_order, "REVERSED", 2**12)
    h = hessian(correlated(600, 512))
    with LiveBytes(h) as in_place:
        factor = _Factor.of(h, True, 0.01, "x")
    with LiveBytes(h) as anew:
        flipped_factor(h, factor.order, 0.01)
    assert in_place.peak < 1.2 * h.nbytes
    assert anew.peak > 1.9 * h.nbytes


def test_rounding_takes_one_matrix_beside_the_weights() -> None:
    """The errors are float64 as a whole, the codes of one block at a time."""
    values = random_weight(512, 300).double() * 5
    feedback = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).triu_(1) / 512
    with LiveBytes(values, feedback) as live:
        codes = _rounded(values, feedback, IntFormat(4), 64)
    assert values.nbytes < live.peak < 1.6 * values.nbytes
    errors = torch.zeros_like(values)
    for j, row in enumerate(values):  # the rule as it is written
        errors[j] = row - (row + feedback[:j, j] @ errors[:j]).round().clamp(-8, 7)
    assert torch.equal(codes, (values - errors).round().to(torch.int8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x, weight = correlated(10, 4), random_weight(3, 4)
    h = hessian(x)
    x[3, 2] = weight[1, 1] = bad
    with pytest.raises(InputError, match=r"'blocks\.0\.qkv'.*NaN or Inf"):
        hessian(x, site="blocks.0.qkv")
    with pytest.raises(InputError, match=r"'blocks\.0\.qkv'.*weights of rows"):
        hessian(correlated(3, 4), torch.tensor([1.0, bad, 0.0]), site="blocks.0.qkv")
    with pytest.raises(InputError, match=r"'blocks\.0\.qkv'.*NaN or Inf"):
        round_weights(weight, torch.ones(3), h, 4, site="blocks.0.qkv")
    with pytest.raises(InputError, match=r"'blocks\.0\.qkv'.*NaN or Inf"):
        scaled_codes(weight, h, 4, FACTORS, site="blocks.0.qkv")


def test_settings_that_give_no_hessian_are_refused() -> None:
    x = correlated(3, 4)
    with pytest.raises(InputError, match="negative"):
        hessian(x, torch.tensor([1.0, -1.0, 0.0]))
    for mix in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="mix"):
            hessian(x, mix=mix)
    x[:, 1] = 0
    with pytest.raises(InputError, match=r"'fc1'.*singular.*damping"):
        round_weights(random_weight(2, 4), torch.ones(2), hessian(x), 4, damping=0.0, site="fc1")


def test_inputs_and_weights_of_any_magnitude() -> None:
    """The codes depend on ratios alone, as far as fp32 has normal numbers."""
    x, weight = correlated(100, 16), random_weight(8, 16)
    scale = minmax(weight, 4)
    expected = round_weights(weight, scale, hessian(x), 4)
    for power in (-100, -30, 60, 100):
        factor = 2.0**power
        assert torch.equal(round_weights(weight, scale, hessian(x * factor), 4), expected)
        assert torch.equal(round_weights(weight * factor, scale * factor, hessian(x), 4), expected)


def test_chosen_scales_are_the_better_of_two_measures_in_every_row() -> None:
    weight, h = random_weight(64, 64), hessian(correlated(300, 64))
    weight[:, 3] *= 3  # one weight in 64 stretches the range
    base = minmax(weight, 4)
    candidates = torch.stack([base, *(uniform.multiples(base, factor) for factor in FACTORS)])
    scale, codes = scaled_codes(weight, h, 4, FACTORS)
    assert (candidates == scale).any(0).all()
    assert torch.equal(codes, round_weights(weight, scale, h, 4))

    chosen, rivals = loss(weight, scale, codes, h), []
    for measure in (torch.ones(64), h.diagonal().float()):
        errors = torch.stack([(nearest(weight, s, 4) * s[:, None] - weight).square() @ measure for s in candidates])
        proposed = candidates.gather(0, errors.argmin(0)[None])[0]
        rivals.append(loss(weight, proposed, round_weights(weight, proposed, h, 4), h))
    torch.testing.assert_close(chosen, torch.minimum(*rivals))
    assert all((chosen < 0.99 * rival).any() for rival in rivals)  # each measure proposes better scales for some rows
    assert chosen.sum() < 0.9 * loss(weight, base, round_weights(weight, base, h, 4), h).sum()


def test_the_scale_of_rows_without_a_range_is_one() -> None:
    weight, h = random_weight(3, 8), hessian(correlated(20, 8))
    weight[1] = 0
    scale, _ = scaled_codes(weight, h, 4, torch.tensor([1.0]))
    assert scale[1] == 1
    assert torch.equal(scale, minmax(weight, 4))
