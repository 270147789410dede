"""The PTX of `hopper_flash`: what Gluon has no operation for, or needs more instructions for."""

from triton.experimental import gluon


@gluon.constexpr_function
def constraints(count):
    """Return the constraints of `rescaling`: results and three operands, each in `count` registers of a thread."""
    return ",".join(["=r"] * count + [str(i) for i in range(count)] + ["r"] * (2 * count))


@gluon.constexpr_function
def rescaling(count):
    """Return the PTX of `hopper_flash._rescale` for sums in `count` registers of a thread."""
    text = f"{{ .reg .pred p; .reg .b32 t; or.b32 t, ${3 * count}, ${3 * count + 2}; setp.ne.s32 p, t, 0; "
    text += "vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; "
    for i in range(count):
        text += f"add.s32 t, ${i}, ${2 * count + i}; mul.hi.s32 t, t, ${3 * count + i}; mad.lo.s32 ${i}, t, 2, ${i}; "
    return text + "DONE: }"


@gluon.constexpr_function
def coding(bits, half):
    """Return the PTX that makes four codes of powers, the integer round(power levels) - 128 each.

    `bits`: of a code. `half`: powers are rounded to fp16 first, and two of them are scaled at once.
    """
    if half:
        level = ((bits + 14) << 10) + 1024 - (1 << (11 - bits))  # the bits of 2^bits - 1 in fp16
        return (
            f"{{ .reg .b32 a, b, l, m; mov.b32 l, {level * 0x10001}; mov.b32 m, 0x64806480; "
            "cvt.rn.f16x2.f32 a, $2, $1; cvt.rn.f16x2.f32 b, $4, $3; fma.rn.f16x2 a, a, l, m; "
            "fma.rn.f16x2 b, b, l, m; prmt.b32 $0, a, b, 0x6420; }"
        )
    return (
        "{ .reg .f32 a, b, c, d, m; .reg .b32 i, j, k, n; mov.f32 m, 0f4B3FFF80; fma.rn.f32 a, $1, $5, m; "
        "fma.rn.f32 b, $2, $6, m; fma.rn.f32 c, $3, $7, m; fma.rn.f32 d, $4, $8, m; "
        "mov.b32 i, a; mov.b32 j, b; mov.b32 k, c; mov.b32 n, d; "
        "prmt.b32 i, i, j, 0x0040; prmt.b32 k, k, n, 0x0040; prmt.b32 $0, i, k, 0x5410; }"
    )
