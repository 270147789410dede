"""The CPU backend's verbs inside torch.compile and as operators: the same results, and shapes that torch foretells."""

from collections.abc import Callable

import pytest
import torch
from operands import Maker, inject, maker
from torch.library import opcheck

from tqdit.backends import operators
from tqdit.ops.composed import Composed
from tqdit.ops.schema import Activation, AttentionParams, Codes, Float, Norm, OperandParams, Residual
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
        self.row, self.wide_row = make.params(Grid.ROW, BATCH), make.params(Grid.ROW, BATCH, channels=WIDTH)
        self.balanced = make.params(Grid.MRQ_GELU, BATCH, channels=WIDTH)
        self.rows = make.attention(HEADS, Grid.SOFTMAX_ROW, BATCH)
        self.row_codes = inject(run, make.codes(BATCH, TOKENS, WIDTH), self.row)
        self.prompt = inject(run, make.codes(BATCH, LENGTH, WIDTH), self.text)
        self.codes = inject(run, make.codes(BATCH, TOKENS, WIDTH), self.source)
        self.wide = inject(run, make.codes(BATCH, TOKENS, WIDTH), self.gelu)
        self.bias = make.values(BATCH, LENGTH)
        self.qkv, self.q, self.kv, self.out = (
            run.prepare(make.weight(parts * WIDTH, WIDTH), make.values(parts * WIDTH)) for parts in (3, 1, 2, 1)
        )
        self.float_input = run.prepare_float_input(make.weight(9, WIDTH), make.values(9))
        self.many_rows = make.values(BATCH, 3 * TOKENS, 3 * WIDTH)
        self.deep_float_input = run.prepare_float_input(make.weight(9, 3 * WIDTH), make.values(9))

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

    def own_rows(self, target: OperandParams) -> Codes:
        qkv = self.run.project(self.row_codes, self.row, self.qkv, self.rows.projections, HEADS)
        return self.run.attend(qkv, self.rows, target)

    def linear(self, codes: Codes, source: OperandParams, then: Activation | Residual | Float | None) -> Codes:
        return self.run.linear(codes, source, self.out, then)


VERBS: dict[str, Callable[[Case], Codes]] = {
    "quantize": lambda c: c.run.quantize(c.x, c.source),
    "quantize, two regions": lambda c: c.run.quantize(c.x, c.gelu),
    "quantize, norm": lambda c: c.run.quantize(c.x, c.source, c.norm),
    "attend": Case.own,
    "attend, context": lambda c: c.cross(None),
    "attend, context, bias": lambda c: c.cross(c.bias),
    "linear": lambda c: c.linear(c.codes, c.source, None),
    "linear, bf16": lambda c: c.linear(c.codes, c.source, Float(torch.bfloat16)),
    "linear, fp16 from bf16 rows": lambda c: c.run.linear(
        c.run.quantize(c.x.bfloat16(), c.wide_row), c.wide_row, c.out, Float(torch.float16)
    ),
    "linear, two regions": lambda c: c.linear(c.wide, c.gelu, None),
    "linear, activation": lambda c: c.linear(c.codes, c.source, Activation(c.gelu)),
    "linear, residual": lambda c: c.linear(c.codes, c.source, Residual(c.x)),
    "linear, bf16 residual": lambda c: c.linear(c.wide, c.gelu, Residual(c.x.bfloat16())),
    "linear, gated residual": lambda c: c.linear(c.codes, c.source, Residual(c.x, c.modulation[:, 2 * WIDTH :])),
    "quantize rows": lambda c: c.run.quantize(c.x, c.wide_row),
    "quantize rows, norm": lambda c: c.run.quantize(c.x, c.row, c.norm),
    "attend, softmax rows": lambda c: c.own_rows(c.target),
    "attend, rows": lambda c: c.own_rows(c.wide_row),
    "linear, rows": lambda c: c.linear(c.row_codes, c.row, None),
    "linear, activation from rows to rows": lambda c: c.linear(c.row_codes, c.row, Activation(c.wide_row)),
    "linear, activation from rows, channel factors": lambda c: c.linear(c.row_codes, c.row, Activation(c.balanced)),
    "linear, gated residual of rows": lambda c: c.linear(
        c.row_codes, c.row, Residual(c.x, c.modulation[:, 2 * WIDTH :])
    ),
    "float_input_linear": lambda c: c.run.float_input_linear(c.x, c.float_input),
    "float_input_linear, many rows": lambda c: c.run.float_input_linear(c.many_rows, c.deep_float_input, torch.float32),
    "float_input_linear, many bf16 rows": lambda c: c.run.float_input_linear(
        c.many_rows.bfloat16(), c.deep_float_input, torch.bfloat16
    ),
}


def assert_same(actual: Codes, expected: Codes, verb: str) -> None:
    """Tensors, or codes of rows with their steps, of the same types and equal."""
    assert type(actual) is type(expected), verb
    tensors = ((actual,), (expected,)) if isinstance(actual, torch.Tensor) else (actual, expected)
    for a, b in zip(*tensors, strict=True):
        assert a.dtype is b.dtype, verb
        assert torch.equal(a, b), verb


@pytest.mark.parametrize("verb", VERBS)
def test_a_compiled_verb_gives_the_same(fast: Composed, verb: str) -> None:
    case = Case(fast, maker(0))
    expected = VERBS[verb](case)
    compiled = torch.compile(VERBS[verb], fullgraph=True, backend="aot_eager")
    assert_same(compiled(case), expected, verb)


def test_all_verbs_compile_into_one_graph(run: Composed) -> None:
    """Whatever the backend runs on: compiled kernels, oneDNN, or torch alone."""

    def every(case: Case) -> list[Codes]:
        return [verb(case) for verb in VERBS.values()]

    case = Case(run, maker(1))
    expected, actual = every(case), torch.compile(every, fullgraph=True, backend="eager")(case)
    for name, a, b in zip(VERBS, expected, actual, strict=True):
        if "float_input" in name:
            torch.testing.assert_close(a, b)
        else:
            assert_same(b, a, name)


def test_the_compiler_of_torch_takes_them(fast: Composed) -> None:
    """With inductor, which lays out memory itself."""
    case = Case(fast, maker(2))
    compiled = torch.compile(lambda c: (c.cross(c.bias), c.linear(c.codes, c.source, Residual(c.x))), fullgraph=True)
    crossed, updated = compiled(case)
    assert torch.equal(crossed, case.cross(case.bias))
    assert torch.equal(updated, case.linear(case.codes, case.source, Residual(case.x)))


def _calls_of_ends(run: Composed) -> list[tuple[Callable[..., torch.Tensor], tuple[object, ...]]]:
    """Layers in float and of codes, with latents that are not contiguous."""
    make = maker(4)
    x = make.values(BATCH, 3, 4, 6).to(memory_format=torch.channels_last)
    held = run.prepare_float_input(make.weight(WIDTH, 12), make.values(WIDTH))
    stream, modulation, position = make.values(BATCH, 6, WIDTH), make.values(BATCH, 2 * WIDTH), make.values(6, WIDTH)
    last = make.values(20, WIDTH)  # of 5 channels
    return [
        (operators.embed, (x, held.codes, held.scale, held.bias, position, 2, 0)),
        (operators.embed, (x.half(), make.values(WIDTH, 12), None, None, position, 2, 1)),
        (operators.unembed, (stream, modulation, 1e-6, last, None, make.values(20), x.half(), 2)),
    ]


def test_operators_keep_what_they_promise_to_torch(fast: Composed) -> None:
    """Schemas, and the shapes, dtypes and strides that tracing foretells."""
    case = Case(fast, maker(3))
    flat, weight = operators.flatten, operators.flat_weight(case.out.weight)
    shift, scale, eps = case.norm
    attention = flat(*case.attention.projections, case.attention.softmax, case.target)
    query = fast.project(case.codes, case.source, case.q, [case.attention.query], HEADS)
    context = fast.project(case.prompt, case.text, case.kv, case.attention.projections[1:], HEADS)
    qkv = fast.project(case.codes, case.source, case.qkv, case.attention.projections, HEADS)
    values = flat(*case.rows.projections, case.rows.softmax)
    calls = [
        (operators.quantize, (case.x, None, None, 0.0, *flat(case.gelu))),
        (operators.quantize, (case.x, shift, scale, eps, *flat(case.source))),
        (operators.quantize_rows, (case.x, None, None, 0.0, *flat(case.wide_row), True)),
        (operators.quantize_rows, (case.x.bfloat16(), None, None, 0.0, *flat(case.wide_row), False)),
        (operators.quantize_rows, (case.x, shift, scale, eps, *flat(case.row), False)),
        (operators.project, (case.codes, None, *weight, HEADS, *flat(case.source, case.attention.query))),
        (operators.project, (*case.row_codes, *weight, HEADS, *flat(case.row, case.attention.query))),
        (operators.attend, (qkv, None, None, HEADS, *attention)),
        (operators.attend, (qkv, None, None, HEADS, *values)),
        (operators.attend, (query, context, case.bias, HEADS, *attention)),
        (operators.linear_gelu, (case.codes, None, *weight, *flat(case.source, case.gelu))),
        (operators.linear_gelu, (*case.row_codes, *weight, *flat(case.row, case.balanced))),
        (operators.linear, (case.codes, None, *weight, *flat(case.source), 0)),
        (operators.linear, (*case.row_codes, *weight, *flat(case.row), 1)),
        (operators.linear_added, (case.wide, None, *weight, *flat(case.gelu), None, case.x.bfloat16())),
        (operators.linear_added, (*case.row_codes, *weight, *flat(case.row), shift, case.x)),
        *_calls_of_ends(fast),
    ]
    for operator, arguments in calls:
        found = opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}
