"""Say in words what made a tensor, and what it depends on: the facts that a trace keeps of every tensor of a call.

Each function that a model calls gives its result a word, by its own name and by the words of its inputs. A product of
a norm and of something that depends on the timestep is a "modulated norm", for example.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TIME, SAMPLE, PROMPT = "t", "x", "prompt"  # what a tensor may depend on; the prompt stands for all other conditions

NORM, MODULATED, STREAM, ATTENTION = "norm", "modulated norm", "stream", "attention"
LINEAR, CONVOLUTION, ARGUMENT, CONSTANT = "linear", "convolution", "argument", "constant"
GELU = ("GELU tanh", "GELU erf")
NORMED = (NORM, MODULATED)

# Functions whose result has a word of its own.
NAMED = {
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize"), NORM),
    "silu": "SiLU", "relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax", "mish": "Mish",
    "rsqrt": "rsqrt", "sqrt": "sqrt", "linear": LINEAR,
}  # fmt: skip
PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"}
FACTORS = {"mul", "multiply", "__mul__", "__rmul__", "__imul__", "mul_"}
QUOTIENTS = {"div", "true_divide", "divide", "__truediv__", "__itruediv__", "div_"}
SUMS = {"add", "sub", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "rsub", "__isub__", "add_", "sub_"}
JOINS = {"cat", "concat", "concatenate", "stack", "pad_sequence", "hstack", "vstack", "where", "__setitem__",
         "index_put_", "index_copy_", "index_add_", "scatter_", "scatter", "scatter_add_", "scatter_reduce_", "copy_",
         "index_put", "index_copy", "index_add", "masked_scatter"}  # fmt: skip
# Functions whose result has the values of their first input, in another arrangement, type or number of copies.
ARRANGEMENTS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "swapaxes", "movedim", "squeeze",
                "unsqueeze", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as",
                "detach", "expand", "expand_as", "view_as", "reshape_as", "broadcast_to", "repeat",
                "repeat_interleave", "tile", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select",
                "narrow", "__getitem__", "__get__", "index_select", "gather", "take_along_dim", "roll", "flip", "pad",
                "dropout", "feature_dropout", "alias", "t", "cpu", "cuda", "neg", "__neg__", "clamp", "clip",
                "clamp_", "clip_", "masked_fill", "masked_fill_", "nan_to_num", "nan_to_num_", "unfold", "fold",
                "pixel_shuffle", "pixel_unshuffle", "view_as_real", "view_as_complex", "masked_select",
                "requires_grad_"}  # fmt: skip
# Functions that take no value from their inputs: shape, dtype and device at most.
CONSTANTS = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
             "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "arange"}  # fmt: skip
# Functions that take no value from any input but the first.
FIRST_ONLY = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


@dataclass(frozen=True)
class Origin:
    """The facts of one tensor.

    `word` says what made it, `depends` is what it depends on. Tensors of one `value` hold the same rows of numbers,
    as long as their `version`, torch's count of writes, is this one.
    """

    word: str
    depends: frozenset[str]
    value: int
    version: int


@dataclass(frozen=True)
class Part:
    """An input of a function: the word and the dependence of a tensor, and how many elements it has."""

    word: str
    depends: frozenset[str]
    elements: int


def result_word(name: str, parts: Sequence[Part], tanh: bool, last_axis: bool) -> str:
    """Return the word for what the function `name` makes of `parts`, its tensor inputs.

    `tanh`: of GELU, whether it is the approximation by tanh. `last_axis`: of a join, whether it joins channels.
    """
    if not parts:
        return CONSTANT
    if (word := _by_name(name, parts, tanh)) is not None:
        return word
    if name in JOINS:
        return _join(parts[1:] if name == "where" and len(parts) == 3 else parts, last_axis)
    if name == "addcmul":  # shift + x * scale
        product = Part(_product(parts[1], parts[2]), parts[1].depends | parts[2].depends, parts[1].elements)
        return _sum(parts[0], product)
    if name in ARRANGEMENTS or (name in ARITHMETIC and len(parts) == 1):  # the other operand is a number
        return parts[0].word
    return ARITHMETIC[name](parts[0], parts[1]) if name in ARITHMETIC else name.strip("_")


def _by_name(name: str, parts: Sequence[Part], tanh: bool) -> str | None:
    """Return the word of a function that has one of its own, whatever its inputs are."""
    plain = name.rstrip("_")
    if plain == "gelu":
        return GELU[0] if tanh else GELU[1]
    if "attention" in name or "attn" in name:  # torch's own, and the operators of attention libraries
        return ATTENTION
    if name in PRODUCTS:
        return ATTENTION if any(part.word == "softmax" for part in parts) else "matmul"
    return CONVOLUTION if name.startswith("conv") else NAMED.get(plain)


def _adjusts(factor: Part, of: Part) -> bool:
    """Say whether an input is a factor or a shift for the rows of another, rather than its equal."""
    return factor.elements < of.elements or not factor.depends or factor.depends == {TIME}


def _adjusted(part: Part, factor: Part) -> str:
    return MODULATED if part.word in NORMED and factor.depends else part.word


def _product(a: Part, b: Part) -> str:
    if "rsqrt" in (a.word, b.word):
        return NORM
    if "sigmoid" in (a.word, b.word) and ATTENTION in (a.word, b.word):
        return "gated attention"
    for part, factor in _ordered(a, b):
        if _adjusts(factor, part):
            return _adjusted(part, factor)
    if "SiLU" in (a.word, b.word):
        return "SwiGLU"
    return "GEGLU" if {a.word, b.word} & {*GELU} else "gated pair"


def _quotient(a: Part, b: Part) -> str:
    return NORM if b.word in ("sqrt", "norm", "linalg_vector_norm", "std") else a.word


def _sum(a: Part, b: Part) -> str:
    for part, factor in _ordered(a, b):
        if _adjusts(factor, part):
            return _adjusted(part, factor)
    return a.word if a.word == b.word == ATTENTION else STREAM


def _ordered(a: Part, b: Part) -> tuple[tuple[Part, Part], tuple[Part, Part]]:
    """Return both orders of two inputs. First is the one that is led by what is no constant, a norm, or larger."""
    rank_a, rank_b = ((bool(part.depends), part.word in NORMED, part.elements) for part in (a, b))
    return ((a, b), (b, a)) if rank_a >= rank_b else ((b, a), (a, b))


def _join(parts: Sequence[Part], last_axis: bool) -> str:
    """Channels beside each other are a cat of all; tokens after each other have the word of all, or are a stream."""
    if last_axis:
        return f"cat[{', '.join(part.word for part in parts)}]"
    words = {part.word for part in parts if part.depends} or {parts[0].word}
    return words.pop() if len(words) == 1 else STREAM


ARITHMETIC: dict[str, Callable[[Part, Part], str]] = {
    **dict.fromkeys(FACTORS, _product),
    **dict.fromkeys(QUOTIENTS, _quotient),
    **dict.fromkeys(SUMS, _sum),
}
