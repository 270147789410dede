"""Compiles kernels for sm_90a without a GPU; prints what each takes, a JSON object a line.

Those for Hopper, `norm`, and the ordinary ones in the forms of a context: keys of another length, a bias, no gate.

In a process of its own, without TRITON_INTERPRET, which Triton reads when it is imported.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from tqdit.backends.triton.flash import Q_SLOTS, WARPS, FlashSizes
from tqdit.backends.triton.hopper import AttentionSizes, x_blocks
from tqdit.backends.triton.kernels import hopper, hopper_attention, hopper_flash, hopper_float, hopper_scores, rounding
from tqdit.backends.triton.kernels.attention import attention_kernel
from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS, PLAIN, RESIDUAL, linear_kernel
from tqdit.backends.triton.kernels.norm import norm_quantize_kernel
from tqdit.backends.triton.kernels.quantize import quantize_kernel, quantize_rows_kernel
from tqdit.backends.triton.launch import ROW_REGISTERS
from tqdit.backends.triton.layouts import HEADS_OF, Config, powers_of_two

PARTS = {name: parts for parts, name in HEADS_OF.items()}
EPILOGUES = {
    "plain": (PLAIN, rounding.UNIFORM), "residual": (RESIDUAL, rounding.UNIFORM),
    "residual bfloat16": (RESIDUAL, rounding.UNIFORM), "residual float16": (RESIDUAL, rounding.UNIFORM),
    "residual-ungated": (RESIDUAL, rounding.UNIFORM),
    **dict.fromkeys(PARTS, (HEADS, rounding.UNIFORM)), "gelu": (ACTIVATION, rounding.UNIFORM),
    "gelu merged": (ACTIVATION, rounding.GELU_MERGED), "gelu two": (ACTIVATION, rounding.GELU),
}  # fmt: skip
STREAMS = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2)}  # others are fp32
POINTERS = {
    "weight_scale": "*fp32", "weight_sums": "*i32", "bias": "*fp32", "x": "*fp32", "gate": "*fp32", "group": "*i64",
    "source": "*fp32", "row_steps": "*fp32", "steps": "*fp32", "channels": "*fp32", "target": "*fp32",
    "second": "*fp32", "third": "*fp32",
}  # fmt: skip
NUMBERS = ("gate_stride", "M", "width", "K", "TOKENS", "out_stride")


def compiled(asked: str, bm: int, bn: int, stages: int, piece: int):
    """The kernel for DiT-XL/2, as a launch would specialize it; `asked` may end with "rows" and with "channels"."""
    epilogue, rows, channels = forms(asked)
    which, mode = EPILOGUES[epilogue]
    names = hopper.hopper_linear_kernel.arg_names
    kinds = {n: f"tensordesc<i8[{rows},128],{hopper.block_layout()!r}>" for n, rows in (("a", bm), ("b", bn))}
    kinds |= {name: kind for name, kind in POINTERS.items() if name in names} | dict.fromkeys(NUMBERS, "i32")
    kinds["out"] = "*fp32" if which.value == PLAIN.value else "*i8"
    blocks = {"a", "b"}
    if which.value == RESIDUAL.value:
        blocks |= {"x", "out"}
        dtype, size = STREAMS.get(epilogue.partition(" ")[2], ("fp32", 4))
        piece = hopper.X_ROW // size
        kinds |= {n: f"tensordesc<{dtype}[{bm},{piece}],{hopper.x_layout(size)!r}>" for n in ("x", "out")}
    constants = {
        "GROUP_STRIDE": 0, "SOURCE_STRIDE": 8, "TARGET_STRIDES": (128, 128, 128), "HEAD_DIM": 72, "HEAD_PITCH": 80,
        "TOKEN_PITCH": 256, "EPILOGUE": which.value, "PARTS": PARTS.get(epilogue, 1),
        "GATED": which.value == RESIDUAL.value and not epilogue.endswith("ungated"), "MODE": mode.value,
        "TARGET_BITS": 8, "BM": bm, "BN": bn,
        "BK": hopper.BLOCK_K, "BAND": 8, "STAGES": stages, "PIECE": piece or bn,
        "X_BLOCKS": x_blocks(bm, bn, stages, piece or bn), "X_BYTES": hopper.X_ROW, "ROWS": rows, "CHANNELS": channels,
        "CONSUMER_REGISTERS": hopper.REGISTERS[0], "PRODUCER_REGISTERS": hopper.REGISTERS[1],
    }  # fmt: skip
    source = GluonASTSource(
        fn=hopper.hopper_linear_kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in kinds and n not in blocks},
    )
    options = {"num_warps": 4, "enable_fp_fusion": which.value == ACTIVATION.value}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def forms(asked: str) -> tuple[str, bool, bool]:
    """An epilogue, whether rows have steps, and whether channels have factors."""
    words = [word for word in asked.split() if word not in ("rows", "channels")]
    return " ".join(words), "rows" in asked.split(), "channels" in asked.split()


def compiled_attention(
    tokens: int, head_dim: int, mode: int, config: list[int], by_sample: bool, trace: bool, bits: int = 8
):
    """The attention kernel, with one time group or one for each sample; `bits` of the target, 0 for fp32."""
    chosen = Config(*config)
    sizes = AttentionSizes.fitting(chosen, tokens, head_dim)
    assert sizes, config
    k_rest, v_pad = sizes.padded
    blocks = {
        "q": (chosen.block_m, sizes.first), "k": (chosen.block_k, sizes.first), "v": (sizes.first, chosen.block_k),
        "q_rest": (chosen.block_m, k_rest), "k_rest": (chosen.block_k, k_rest), "v_rest": (sizes.rest, chosen.block_k),
    }  # fmt: skip
    kinds = {
        n: f"tensordesc<i8[{rows},{width}],{hopper_scores.block_layout(width)!r}>"
        for n, (rows, width) in blocks.items()
        if rows and width
    }
    kinds |= {"out": "*i8" if bits else "*fp32", "trace": "*i8", "group": "*i64", "factor": "fp32"}
    kinds |= dict.fromkeys(("query", "key", "value", "softmax", "target"), "*fp32")
    kinds |= dict.fromkeys(("sequences", "heads", "out_stride"), "i32")
    constants = {
        "GROUP_STRIDE": int(by_sample), "STRIDES": (128, 128, 128, 8, 8), "N": tokens, "PARTS": sizes.parts,
        "D": head_dim, "D_FIRST": sizes.first, "D_REST": k_rest, "V_REST": sizes.rest, "V_PAD": v_pad, "MODE": mode,
        "BITS": 8, "TARGET_BITS": bits, "SLOTS": sizes.slots, "Q_SLOTS": sizes.q_slots, "BK": chosen.block_k,
        "AT_ONCE": chosen.blocks, "TRACE": trace, "WARPS": sizes.warps,
        "COPY_REGISTERS": hopper_attention.COPY_REGISTERS,
    }  # fmt: skip
    names = hopper_attention.hopper_attention_kernel.arg_names
    constants |= {n: None for n in blocks if n not in kinds}
    source = GluonASTSource(
        fn=hopper_attention.hopper_attention_kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n not in blocks and n != "factor"},
    )
    options = {"num_warps": sizes.warps, "enable_fp_fusion": False, "maxnreg": 128 if sizes.programs == 2 else None}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compiled_flash(head_dim: int, config: list[int], by_sample: bool, bits: int):
    """Attention in one pass; `bits` of the target, 0 for fp32."""
    chosen = Config(*config)
    sizes = FlashSizes.fitting(chosen, 1024, head_dim)
    assert sizes, config
    k_rest, v_pad = sizes.padded
    blocks = {
        "q": (chosen.block_m, sizes.first), "k": (chosen.block_k, sizes.first), "v": (sizes.first, chosen.block_k),
        "q_rest": (chosen.block_m, k_rest), "k_rest": (chosen.block_k, k_rest), "v_rest": (sizes.rest, chosen.block_k),
    }  # fmt: skip
    kinds = {
        n: f"tensordesc<i8[{rows},{width}],{hopper_scores.block_layout(width)!r}>"
        for n, (rows, width) in blocks.items()
        if rows and width
    }
    kinds |= {"out": "*i8" if bits else "*fp32", "group": "*i64", "factor": "fp32"}
    kinds |= dict.fromkeys(("query", "key", "value", "target"), "*fp32")
    kinds |= dict.fromkeys(("sequences", "heads", "N", "KEYS", "out_stride"), "i32")
    constants = {
        "GROUP_STRIDE": int(by_sample), "STRIDES": (128, 128, 128, 8), "D": head_dim, "D_FIRST": sizes.first,
        "D_REST": k_rest, "V_REST": sizes.rest, "V_PAD": v_pad, "BITS": 8, "TARGET_BITS": bits,
        "STAGES": sizes.stages, "Q_SLOTS": Q_SLOTS, "BK": chosen.block_k,
        "HALF": bool(chosen.piece), "REGISTERS": hopper_flash.REGISTERS,
    }  # fmt: skip
    names = hopper_flash.hopper_flash_kernel.arg_names
    constants |= {n: None for n in blocks if n not in kinds}
    plain = {*blocks, "factor", "sequences", "heads"}
    source = GluonASTSource(
        fn=hopper_flash.hopper_flash_kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n not in plain},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compiled_floats(dtype: str, rows: bool, bm: int, bn: int, stages: int, even: bool):
    """The linear kernel with results of a dtype, as a launch would specialize it; `even`: whole tiles of columns."""
    names, size = hopper_float.hopper_float_kernel.arg_names, {"fp32": 4}.get(dtype, 2)
    piece = hopper.X_ROW // size
    kinds = {n: f"tensordesc<i8[{rows},128],{hopper.block_layout()!r}>" for n, rows in (("a", bm), ("b", bn))}
    kinds["y"] = f"tensordesc<{dtype}[{bm},{piece}],{hopper.x_layout(size)!r}>"
    kinds |= {name: kind for name, kind in POINTERS.items() if name in hopper_float.SCALARS}
    kinds |= dict.fromkeys(hopper_float.SMALL_INTEGERS, "i32")
    constants = {
        "GROUP_STRIDE": 1, "SOURCE_STRIDE": 8, "ROWS": rows, "EVEN": even, "BM": bm, "BN": bn, "BK": hopper.BLOCK_K,
        "BAND": 8, "STAGES": stages, "PIECE": piece, "SLOTS": 1, "CONSUMER_REGISTERS": hopper.REGISTERS[0],
        "PRODUCER_REGISTERS": hopper.REGISTERS[1],
    }  # fmt: skip
    source = GluonASTSource(
        fn=hopper_float.hopper_float_kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compiled_norm(stream: str, width: int, config: list[int], by_row: bool = False):
    """The norm kernel where all rows of a program are of one sample; `stream`: bf16 or fp32."""
    chosen = Config(*config)
    first, rest = powers_of_two(width, 16)
    kinds = {"x": f"*{stream}", "out": "*i8", "group": "*i64", "eps": "fp32"}
    kinds |= dict.fromkeys(("shift", "scale", "target"), "*fp32")
    kinds |= dict.fromkeys(("modulation_stride", "M", "TOKENS", "out_stride"), "i32")
    constants = {
        "C": width, "GROUP_STRIDE": 0, "TARGET_STRIDE": 8, "BITS": 8, "PER_TILE": True, "NATIVE": True,
        "ROWS": chosen.block_m, "BLOCKS": chosen.blocks, "STAGES": chosen.stages, "FIRST": first, "REST": rest,
    }  # fmt: skip
    if by_row:
        kinds["steps"] = "*fp32"
    else:
        constants["steps"] = None
    names = norm_quantize_kernel.arg_names
    source = ASTSource(
        fn=norm_quantize_kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n != "eps"},
    )
    options = {"num_warps": chosen.warps, "maxnreg": ROW_REGISTERS if by_row else None}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ordinary(kernel, kinds: dict, constants: dict, plain: set[str], **options):
    """A kernel of Triton's main language; all arguments but `plain` ones are multiples of 16."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, kind in kinds.items()
            if n not in plain and not kind.startswith("tensordesc")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compiled_cross(keys: int, head_dim: int, mode: int, biased: bool, config: list[int]):
    """The ordinary attention kernel: queries of one sequence, keys of another, with a bias or without."""
    chosen = Config(*config)
    first, rest = powers_of_two(head_dim, 32)
    d_rest, v_rest = (max(32, rest), max(16, rest)) if rest else (0, 0)
    bm, bk = chosen.block_m, chosen.block_k
    blocks = {
        "q": (bm, first), "k": (bk, first), "v": (first, bk), "q_rest": (bm, d_rest), "k_rest": (bk, d_rest),
        "v_rest": (v_rest, bk),
    }  # fmt: skip
    kinds = {n: f"tensordesc<i8[{rows},{width}]>" for n, (rows, width) in blocks.items() if rows and width}
    kinds |= {"out": "*i8", "trace": "*i8", "group": "*i64", "factor": "fp32"}
    kinds |= dict.fromkeys(("query", "key", "value", "softmax", "target"), "*fp32")
    kinds |= dict.fromkeys(("N", "CONTEXT", "HEADS", "out_stride", "BLOCKS"), "i32")
    constants = {n: None for n in blocks if n not in kinds}
    if biased:
        kinds |= {"bias": "*fp32", "bias_stride": "i32"}
    else:
        constants |= {"bias": None, "bias_stride": None}
    constants |= {
        "GROUP_STRIDE": 1, "QUERY_STRIDE": 128, "KEY_STRIDE": 0, "VALUE_STRIDE": 0, "SOFTMAX_STRIDE": 8,
        "TARGET_STRIDE": 8, "D": head_dim, "D_FIRST": first, "D_REST": d_rest, "V_REST": v_rest, "MODE": mode,
        "BITS": 8, "TARGET_BITS": 8, "ONE_PASS": keys <= bk, "EDGE": keys % bk != 0, "ALIGNED": head_dim % 8 == 0,
        "PERMUTED": keys % 16 == 0, "TRACE": False, "NATIVE": True, "BM": bm, "BK": bk,
    }  # fmt: skip
    plain = {"factor", "BLOCKS", "CONTEXT", "bias_stride"}
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers}
    return ordinary(attention_kernel, kinds, constants, plain, **options)


def compiled_ordinary(asked: str, config: list[int]):
    """The ordinary linear kernel; `asked` as for that of Hopper."""
    chosen = Config(*config)
    epilogue, rows, channels = forms(asked)
    which, mode = EPILOGUES[epilogue]
    bm, bn, bk = chosen.block_m, chosen.block_n, chosen.block_k
    kinds = {"a": f"tensordesc<i8[{bm},{bk}]>", "b": f"tensordesc<i8[{bn},{bk}]>"}
    given = {"steps": rows, "channels": channels, "row_steps": False}
    kinds |= {name: kind for name, kind in POINTERS.items() if given.get(name, True)}
    kinds |= dict.fromkeys(NUMBERS, "i32")
    kinds["out"] = "*i8" if which.value in (HEADS.value, ACTIVATION.value) else "*fp32"
    constants = {
        **dict.fromkeys((name for name in ("steps", "channels") if not given[name]), None), "b_high": None,
        "GROUP_STRIDE": 1, "SOURCE_STRIDE": 8, "TARGET_STRIDE": 128, "SECOND_STRIDE": 128,
        "THIRD_STRIDE": 128, "HEAD_DIM": 72, "HEAD_PITCH": 80, "TOKEN_PITCH": 128, "BITS": 8, "TWO": False,
        "EPILOGUE": which.value, "PARTS": PARTS.get(epilogue, 1), "GATED": epilogue == "residual", "MODE": mode.value,
        "TARGET_BITS": 8, "PER_TILE": False, "PERMUTED": False, "ALIGNED": True, "NATIVE": True, "BM": bm, "BN": bn,
        "BK": bk, "BAND": chosen.band, "PIECE": chosen.piece or bn,
    }  # fmt: skip
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers}
    fused = which.value == ACTIVATION.value
    return ordinary(linear_kernel, kinds, constants, {"M", "TOKENS"}, enable_fp_fusion=fused, **options)


def compiled_quantize(stream: str, mode: int, config: list[int]):
    """The kernel that quantizes without a norm; that of rows has rows of `block_n`."""
    chosen = Config(*config)
    kinds = {"x": f"*{stream}", "target": "*fp32", "group": "*i64", "out": "*i8"}
    kinds |= dict.fromkeys(("M", "C", "TOKENS", "out_stride"), "i32")
    constants = {"GROUP_STRIDE": 1, "TARGET_STRIDE": 8, "BITS": 8, "NATIVE": True, "channels": None}
    kinds["x_stride"] = "i32"
    if mode == rounding.BY_ROW.value:
        kinds["steps"] = "*fp32"
        first, rest = powers_of_two(chosen.block_n, 16)
        constants |= {"C": chosen.block_n, "ROWS": chosen.block_m, "FIRST": first, "REST": rest}
        kinds.pop("C")
        return ordinary(quantize_rows_kernel, kinds, constants, {"M", "TOKENS"}, num_warps=chosen.warps)
    constants |= {"BM": chosen.block_m, "BN": chosen.block_n}
    return ordinary(quantize_kernel, kinds, constants | {"MODE": mode}, {"M", "TOKENS"}, num_warps=chosen.warps)


COMPILED = {
    "linear": compiled, "attention": compiled_attention, "norm": compiled_norm, "cross": compiled_cross,
    "ordinary": compiled_ordinary, "quantize": compiled_quantize, "floats": compiled_floats, "flash": compiled_flash,
}  # fmt: skip


def resources(kernel, said: str) -> dict:
    """What ptxas said of the kernel, and the registers of the parts that multiply and that copy."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, file.name]
        assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {"multiplies": 0, "copies": 0}
    for part in re.split("USETMAXREG", assembly)[1:]:  # code after a change of the number of registers
        numbers = [int(n) for n in re.findall(r"\bR(\d+)\b", part)]
        numbers += [int(n) + int(bits) // 32 - 1 for n, bits in re.findall(r"\bR(\d+)\.(64|128)\b", part)]
        for name, instruction in (("multiplies", "IGMMA"), ("copies", "UTMALDG")):
            if instruction in part:
                used[name] = max(used[name], *numbers) + 1
    return {
        "shared": kernel.metadata.shared,
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "of_a_thread": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        "warnings": re.findall(r"\(C7\d\d\d\)[^\n]*", said),
        "registers": used,
    }


if __name__ == "__main__":
    triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    for asked in json.loads(sys.argv[2]):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = COMPILED[sys.argv[1]](*asked)
        print(json.dumps({"kernel": asked, **resources(kernel, log.getvalue())}), flush=True)
