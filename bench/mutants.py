"""Make the mutants of a module: each is its source with one small change, which a test should notice.

Not mutated: docstrings, annotations, decorators, f-strings (names and error texts), what a `raise` raises, checks for
the type checker (`assert x is not None`), and the keywords of `NEUTRAL`.
"""

import ast
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass

NEUTRAL = {"strict", "device", "stacklevel"}  # they guard our own mistakes, or have one value on a CPU
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
}  # fmt: skip
PAIRS = [
    ("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("floor", "ceil"), ("any", "all"), ("sum", "mean"),
    ("zeros_like", "ones_like"), ("zeros", "ones"), ("argmin", "argmax"), ("add_", "sub_"), ("mul_", "div_"),
    ("round", "floor"),
]  # fmt: skip
SWAPPED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {"floor": "ceil", "ceil": "floor"}
ROUNDINGS = {"round", "floor", "ceil"}
DROPPED_METHODS = {"clamp", "clamp_", "abs", "sqrt", "square", "square_", "mul_", "sub_", "add_", "clone", "float"}


@dataclass(frozen=True)
class Mutant:
    """`before` becomes `after` in bytes `start` to `end` of the UTF-8 source; `line` counts from 1."""

    line: int
    operator: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutants(source: str, excluded: Collection[str] = ()) -> list[Mutant]:
    """All mutants of a module in the order of its lines; `excluded`: names of functions that stay as they are."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, parents in _walk(ast.parse(source), (), frozenset(excluded)):
        for operator, changed in _changes(node, parents):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            text = ast.unparse(changed)
            after = f"({text})" if isinstance(changed, ast.expr) else text
            before = source.encode()[start:end].decode()
            found.append(Mutant(node.lineno, operator, before, after, start, end))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end))


def _walk(
    node: ast.AST, parents: tuple[ast.AST, ...], excluded: frozenset[str]
) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """The nodes to change, each with those around it, the nearest last."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.FunctionDef) and node.name in excluded):
        return
    if isinstance(node, (ast.stmt, ast.expr)):
        yield node, parents
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _left_out(node, name, parents):
                yield from _walk(child, (*parents, node), excluded)


def _left_out(node: ast.AST, field: str, parents: tuple[ast.AST, ...]) -> bool:
    if field in ("annotation", "returns", "decorator_list", "bases"):
        return True
    alias = isinstance(node, ast.Assign) and _is_type(node.targets[0]) and len(parents) == 1
    neutral = isinstance(node, ast.keyword) and node.arg in NEUTRAL
    return alias or neutral or isinstance(node, ast.Raise) or _is_for_the_type_checker(node)


def _is_for_the_type_checker(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.IsNot)
    )


def _is_type(target: ast.expr) -> bool:
    """Tell a class from a constant by its name: `Combine` is one, `EXACT` is not."""
    return isinstance(target, ast.Name) and target.id[0].isupper() and not target.id.isupper()


def _changes(node: ast.AST, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    """(operator, what takes the place of `node`)."""
    kind = {
        ast.Compare: _compare, ast.BinOp: _binary, ast.BoolOp: _boolean, ast.UnaryOp: _unary, ast.Constant: _constant,
        ast.Call: _call, ast.Subscript: _subscript, ast.Set: _display, ast.Tuple: _display, ast.List: _display,
    }.get(type(node))  # fmt: skip
    if kind is not None:
        yield from kind(node, parents)
    elif isinstance(node, ast.stmt):
        yield from _statement(node, parents)
    if (
        isinstance(node, ast.expr)
        and _is_condition(node, parents)
        and isinstance(node, (ast.Name, ast.Attribute, ast.Call))
    ):
        yield "condition negated", ast.UnaryOp(ast.Not(), node)


def _is_condition(node: ast.AST, parents: tuple[ast.AST, ...]) -> bool:
    parent = parents[-1]
    if isinstance(parent, (ast.If, ast.IfExp, ast.While)):
        return parent.test is node
    return isinstance(parent, ast.comprehension) and node in parent.ifs


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _without(items: list, index: int) -> list:
    return [*items[:index], *items[index + 1 :]]


def _compare(node: ast.Compare, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    for i, old in enumerate(node.ops):
        for new in COMPARISONS[type(old)]:
            yield "comparison", _with(node, ops=[*node.ops[:i], new(), *node.ops[i + 1 :]])


def _binary(node: ast.BinOp, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    if type(node.op) in ARITHMETIC:
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
    if isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        yield from (("operand dropped", side) for side in (node.left, node.right))
    if isinstance(node.left, ast.Call) and _name(node.left) in ROUNDINGS:
        inner = _with(node, left=node.left.args[0])
        yield "rounded later", _with(node.left, args=[inner, *node.left.args[1:]])


def _boolean(node: ast.BoolOp, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    yield "and or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for i in range(len(node.values)):
        rest = _without(node.values, i)
        yield "operand dropped", rest[0] if len(rest) == 1 else _with(node, values=rest)


def _unary(node: ast.UnaryOp, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    if not isinstance(node.op, ast.UAdd):
        yield "sign or not dropped", node.operand


def _constant(node: ast.Constant, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "true false", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield from (("constant", ast.Constant(node.value + step)) for step in (1, -1))
    elif isinstance(node.value, float):
        yield "constant", ast.Constant(2 * node.value if node.value else 1.0)


def _call(node: ast.Call, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    name = _name(node)
    if name in SWAPPED:
        swapped = SWAPPED[name]
        function = ast.Name(swapped) if isinstance(node.func, ast.Name) else _with(node.func, attr=swapped)
        yield "function", _with(node, func=function)
    if name in ROUNDINGS and node.args:
        yield "call dropped", node.args[0]
    if name in DROPPED_METHODS and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
        yield "call dropped", node.func.value
    if name == "isfinite":
        yield "function", ast.UnaryOp(ast.Invert(), _with(node, func=_with(node.func, attr="isnan")))
    if name == "where" and len(node.args) == 3:
        yield "arguments swapped", _with(node, args=[node.args[0], node.args[2], node.args[1]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in ("min", "max"):
            other = ast.keyword("max" if keyword.arg == "min" else "min", keyword.value)
            yield "function", _with(node, keywords=[*_without(node.keywords, i), other])
        elif keyword.arg and keyword.arg not in NEUTRAL:
            yield "keyword dropped", _with(node, keywords=_without(node.keywords, i))


def _subscript(node: ast.Subscript, _: tuple) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.slice, ast.Name) and isinstance(node.ctx, ast.Load):
        yield "index", _with(node, slice=ast.Constant(0))
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for i, part in enumerate(parts):
        for bound in ("lower", "upper", "step") if isinstance(part, ast.Slice) else ():
            if getattr(part, bound) is not None:
                free = _with(part, **{bound: None})
                index = _with(node.slice, elts=[*parts[:i], free, *parts[i + 1 :]]) if len(parts) > 1 else free
                yield "slice", _with(node, slice=index)


def _display(node: ast.Set | ast.Tuple | ast.List, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(getattr(node, "ctx", None), ast.Store) or any(isinstance(item, ast.Slice) for item in node.elts):
        return
    count, of_set = len(node.elts), isinstance(node, ast.Set)
    differ = len({ast.unparse(item) for item in node.elts}) > 1
    if count == 2 and differ and not of_set and not isinstance(parents[-1], ast.Compare):
        yield "elements swapped", _with(node, elts=node.elts[::-1])
    if count > (1 if of_set else 2):
        yield from (("element dropped", _with(node, elts=_without(node.elts, i))) for i in range(count))


def _statement(node: ast.stmt, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.Return) and node.value is not None:
        text = ast.unparse(node.value)
        others = [name for name in _parameters(parents) if name != text]
        if text != "None":
            yield "other result", _with(node, value=ast.Name(others[0]) if others else ast.Constant(None))
    if _removable(node, parents):
        yield "statement removed", ast.Pass()


def _removable(node: ast.stmt, parents: tuple[ast.AST, ...]) -> bool:
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom))
    if isinstance(node, ast.Assert):
        return not _is_for_the_type_checker(node)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id in _bound_before(node, parents)
    return isinstance(node, (ast.Raise, ast.AugAssign, ast.Break, ast.Continue, ast.Assign))


def _function(parents: tuple[ast.AST, ...]) -> ast.FunctionDef | None:
    return next((parent for parent in reversed(parents) if isinstance(parent, ast.FunctionDef)), None)


def _parameters(parents: tuple[ast.AST, ...]) -> list[str]:
    function = _function(parents)
    return [a.arg for a in function.args.args if a.arg not in ("self", "cls")] if function else []


def _bound_before(node: ast.stmt, parents: tuple[ast.AST, ...]) -> set[str]:
    function = _function(parents)
    inside = ast.walk(function) if function else ()
    stored = {
        n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.lineno < node.lineno
    }
    return stored | set(_parameters(parents))


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
