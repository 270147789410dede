"""The CPU backend's verbs inside torch.compile and as operators: the same results, and shapes that torch foretells."""

from collections.abc import Callable

import pytest
import torch
from operands import Maker, inject, maker
from torch.library import opcheck

from tqdit.backends import operators
from tqdit.ops.composed import Composed
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, Residual
from tqdit.spec import Grid

BATCH, TOKENS, LENGTH, WIDTH, HEADS = 2, 5, 7, 24, 2


class Case:
    """Operands and layers of one cross-attention block; samples are in time groups of their own."""

    def __init__(self, run: Composed, make: Maker) -> None:
        self.run = run
        self.x, self.modulation = make.values(BATCH, TOKENS, WIDTH), make.values(BATCH, 3 * WIDTH)
        self.source, self.text, self.target = (make.params(lead=BATCH), make.params(), make.params(lead=BATCH))
        self.gelu = make.params(Grid.MRQ_GELU, BATCH)
        self.attention: AttentionParams = make.attention(HEADS, Grid.MRQ_SOFTMAX, BATCH)
        self.prompt = inject(run, make.codes(BATCH, LENGTH, WIDTH), self.text)
        self.codes = inject(run, make.codes(BATCH, TOKENS, WIDTH), self.source)
        self.wide = inject(run, make.codes(BATCH, TOKENS, WIDTH), self.gelu)
        self.bias = make.values(BATCH, LENGTH)
        self.qkv, self.q, self.kv, self.out = (
            run.prepare(make.weight(parts * WIDTH, WIDTH), make.values(parts * WIDTH)) for parts in (3, 1, 2, 1)
        )
        self.float_input = run.prepare_float_input(make.weight(9, WIDTH), make.values(9))

    @property
    def norm(self) -> Norm:
        return Norm(self.modulation[:, :WIDTH], self.modulation[:, WIDTH : 2 * WIDTH], 1e-6)

    def cross(self, bias: torch.Tensor | None) -> torch.Tensor:
        query = self.run.project(self.codes, self.source, self.q, [self.attention.query], HEADS)
        context = self.run.project(self.prompt, self.text, self.kv, self.attention.projections[1:], HEADS)
        return self.run.attend(query, self.attention, self.target, context, bias)

    def own(self) -> torch.Tensor:
        qkv = self.run.project(self.codes, self.source, self.qkv, self.attention.projections, HEADS)
        return self.run.attend(qkv, self.attention, self.target)

    def linear(self, codes: torch.Tensor, source: OperandParams, then: Activation | Residual | None) -> torch.Tensor:
        return self.run.linear(codes, source, self.out, then)


VERBS: dict[str, Callable[[Case], torch.Tensor]] = {
    "quantize": lambda c: c.run.quantize(c.x, c.source),
    "quantize, two regions": lambda c: c.run.quantize(c.x, c.gelu),
    "quantize, norm": lambda c: c.run.quantize(c.x, c.source, c.norm),
    "attend": Case.own,
    "attend, context": lambda c: c.cross(None),
    "attend, context, bias": lambda c: c.cross(c.bias),
    "linear": lambda c: c.linear(c.codes, c.source, None),
    "linear, two regions": lambda c: c.linear(c.wide, c.gelu, None),
    "linear, activation": lambda c: c.linear(c.codes, c.source, Activation(c.gelu)),
    "linear, residual": lambda c: c.linear(c.codes, c.source, Residual(c.x)),
    "linear, bf16 residual": lambda c: c.linear(c.wide, c.gelu, Residual(c.x.bfloat16())),
    "linear, gated residual": lambda c: c.linear(c.codes, c.source, Residual(c.x, c.modulation[:, 2 * WIDTH :])),
    "float_input_linear": lambda c: c.run.float_input_linear(c.x, c.float_input),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_compiled_verb_gives_the_same(fast: Composed, verb: str) -> None:
    case = Case(fast, maker(0))
    expected = VERBS[verb](case)
    compiled = torch.compile(VERBS[verb], fullgraph=True, backend="aot_eager")
    actual = compiled(case)
    assert actual.dtype is expected.dtype
    assert torch.equal(actual, expected)


def test_all_verbs_compile_into_one_graph(run: Composed) -> None:
    """Whatever the backend runs on: compiled kernels, oneDNN, or torch alone."""

    def every(case: Case) -> list[torch.Tensor]:
        return [verb(case) for verb in VERBS.values()]

    case = Case(run, maker(1))
    expected, actual = every(case), torch.compile(every, fullgraph=True, backend="eager")(case)
    for name, a, b in zip(VERBS, expected, actual, strict=True):
        if "float_input" in name:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), name


def test_the_compiler_of_torch_takes_them(fast: Composed) -> None:
    """With inductor, which lays out memory itself."""
    case = Case(fast, maker(2))
    compiled = torch.compile(lambda c: (c.cross(c.bias), c.linear(c.codes, c.source, Residual(c.x))), fullgraph=True)
    crossed, updated = compiled(case)
    assert torch.equal(crossed, case.cross(case.bias))
    assert torch.equal(updated, case.linear(case.codes, case.source, Residual(case.x)))


def test_operators_keep_what_they_promise_to_torch(fast: Composed) -> None:
    """Schemas, and the shapes, dtypes and strides that tracing foretells."""
    case = Case(fast, maker(3))
    flat, weight = operators.flatten, operators.flat_weight(case.out.weight)
    shift, scale, eps = case.norm
    attention = flat(*case.attention.projections, case.attention.softmax, case.target)
    query = fast.project(case.codes, case.source, case.q, [case.attention.query], HEADS)
    context = fast.project(case.prompt, case.text, case.kv, case.attention.projections[1:], HEADS)
    qkv = fast.project(case.codes, case.source, case.qkv, case.attention.projections, HEADS)
    calls = [
        (operators.quantize, (case.x, None, None, 0.0, *flat(case.gelu))),
        (operators.quantize, (case.x, shift, scale, eps, *flat(case.source))),
        (operators.project, (case.codes, *weight, HEADS, *flat(case.source, case.attention.query))),
        (operators.attend, (qkv, None, None, HEADS, *attention)),
        (operators.attend, (query, context, case.bias, HEADS, *attention)),
        (operators.linear_gelu, (case.codes, *weight, *flat(case.source, case.gelu))),
        (operators.linear, (case.codes, *weight, *flat(case.source), None, None)),
        (operators.linear, (case.wide, *weight, *flat(case.gelu), None, case.x.bfloat16())),
        (operators.linear, (case.codes, *weight, *flat(case.source), shift, case.x)),
    ]
    for operator, arguments in calls:
        found = opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}
