"""Mutants that change nothing that anybody could see, or nothing on a CPU, each with its reason."""

from mutants import Mutant

# (module, a part of the line or of it and the next, operator or "" for all, the start of the result or "", reason)
EQUIVALENT: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "grids/packing",
        "if bits == 8:\n        return flat",
        "constant",
        "(9)",
        "a fast path: the general one stores the same bytes",
    ),
    ("grids/regions", "torch.where(x < 0, s1, s2)", "comparison", "(x <= 0)", "0 has the code 0 in both regions"),
    ("grids/regions", "else x < 0", "comparison", "(x <= 0)", "0 has the code 0 in both regions"),
    ("grids/regions", "torch.where(value < 0", "", "(value <= 0)", "the code 0 is 0 in both regions"),
    ("grids/regions", "torch.where(value < 0", "constant", "(1)", "the code 0 is 0 in both regions"),
    ("grids/regions", "value = codes.float()", "call dropped", "", "a float scale makes the product float"),
    ("grids/regions", "(mantissa == 0.5) &", "arithmetic", "((mantissa == 0.5) |", "each implies the other"),
    ("grids/regions", "(mantissa == 0.5) &", "operand dropped", "(mantissa == 0.5)", "each implies the other"),
    ("grids/regions", "(mantissa == 0.5) &", "operand dropped", "(s1 * 2.0 ** shift == s2)", "each implies the other"),
    (
        "grids/regions",
        "lowest = fmt.qmin",
        "constant",
        "",
        "255 and 254 or 256 have the same power of two for our bits",
    ),
    ("search/operands", "table[0, self.unit]", "constant", "(-1)", "a weight has one group"),
    ("search/operands", "tables[:, 0, self.unit]", "constant", "(-1)", "a weight has one group"),
    ("search/operands", "tables[:, self.lead, 0]", "constant", "(-1)", "a linear input has one unit"),
    ("search/operands", "values.is_cuda", "", "", "no GPU, and both ways give the same sums"),
    ("search/operands", "members = ", "", "", "no GPU"),
    ("search/operands", "found = members", "", "", "no GPU"),
    ("search/operands", "return found.float()", "", "", "no GPU"),
    ("search/operands", "unit = torch.arange(spec.units) if", "comparison", "(spec.units >= 1)", "range(1) is [0]"),
    ("search/operands", "unit = torch.arange(spec.units) if", "constant", "(0)", "range(1) is [0]"),
    ("search/operands", "unit = unit.to(values.device)", "", "", "no GPU"),
    ("search/operands", "per_row.amax(0, keepdim=True)", "constant", "(-1)", "it has one dimension"),
    ("search/operands", "lead = torch.zeros(1", "", "", "a weight has one group, nobody reads it"),
    ("search/operands", "return Operand(specs[0]", "constant", "(-1)", "stacked weights have the same bits and role"),
    ("search/operands", "zero = torch.zeros_like(ranges.low", "", "", "two regions have no zero point"),
    ("search/operands", "ranges = RangeStats(torch.zeros_like", "", "", "every range is widened to contain 0"),
    ("search/alternating", 'device.type == "cuda"', "", "", "no GPU"),
    ("search/alternating", "argmin(0, keepdim=True)", "keyword dropped", "", "the index is expanded to the same shape"),
    ("search/alternating", "argmin(0, keepdim=True)", "true false", "", "the index is expanded to the same shape"),
    (
        "search/alternating",
        ".expand(1, *tables.shape[1:])",
        "constant",
        "(2)",
        "the same row twice, the first is taken",
    ),
    ("search/alternating", "tables.gather(0, index)[0]", "constant", "(-1)", "there is one row"),
    ("artifact/tensors", "tensor.numel() >= 256", "constant", "", "any size is small"),
    ("artifact/tensors", "tensor.numel() >= 256", "comparison", "(tensor.numel() > 256)", "any size is small"),
    ("search/solver", 'two_region and choice == "best"', "operand dropped", "(choice", "uniform twice is uniform"),
    ("sampling/trajectory", "% 2**63", "constant", "(64)", "no seed is so large"),
    ("sampling/trajectory", "% 2**63", "constant", "(62)", "no seed is so large"),
    ("sampling/trajectory", "% 2**63", "constant", "(3)", "no seed is so large"),
    ("ops/reference", "MAX_PRODUCT = 128 * 128", "constant", "(129)", "smaller pieces of K are exact, too"),
    ("ops/reference", "EXACT_FP32 = 2**24", "constant", "(23)", "smaller pieces of K are exact, too"),
    ("ops/reference", "if k <= EXACT_FP32", "comparison", "(k < EXACT_FP32)", "the other ways are exact, too"),
    ("ops/reference", "start=_ZERO", "keyword dropped", "", "the sum of tensors may start from 0"),
    ("ops/reference", "if b.ndim > 2:", "constant", "(1)", "fp64 is exact for matrices, too"),
    ("ops/reference", "if b.ndim > 2:", "comparison", "(b.ndim >= 2)", "fp64 is exact for matrices, too"),
    ("ops/reference", "codes = torch.randint(-128", "", "", "any probe with large codes"),
    ("ops/reference", "codes[:8], codes[8:16]", "", "", "any probe with large codes"),
    ("ops/reference", "negative.float() *", "call dropped", "(negative", "a float scale makes the product float"),
    ("ops/reference", "positive.float() *", "call dropped", "(positive", "a float scale makes the product float"),
    ("ops/reference", "transpose(-1, -2)", "sign or not dropped", "(2)", "attention has four axes"),
    ("ops/reference", "codes.sum(-1, keepdim=True", "keyword dropped", "(codes.sum(-1, keepdim=True))", "int64 sums"),
    ("grids/uniform", "(codes.to(torch.int32)", "call dropped", "", "a float scale makes the product float"),
)


def reason(module: str, source: str, mutant: Mutant) -> str | None:
    """Why no test can find the mutant, or None."""
    line, *following = source.splitlines()[mutant.line - 1 : mutant.line + 1]
    lines = "\n".join([line, *following])
    for of, part, operator, after, why in EQUIVALENT:
        same = of == module and 0 <= lines.find(part) < len(line) and operator in ("", mutant.operator)
        if same and mutant.after.startswith(after):
            return why
    return None
