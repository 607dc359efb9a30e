# mypy: ignore-errors
"""Conversion, dequantisation and matrix product, the same numbers compiled and in Triton's interpreter.

The interpreter keeps bf16 as the integers that hold its bits: it truncates where hardware rounds to nearest even, and
multiplies the integers in ``tl.dot``. Both are written out here for it; compiled code sees only the usual instructions.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """``x`` rounded to nearest even in ``DTYPE``."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation; ``PRECISION`` is how fp32 operands are multiplied."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def exact(code, scale, zero, DTYPE: tl.constexpr):
    """``code * scale + zero`` as the reference computes it: in fp32, then rounded to ``DTYPE``.

    The product of 8 and 11 bits is exact in fp32, so a fused multiply-add changes nothing.
    """
    return convert(code.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32), DTYPE)


# Codes are loaded as words of four bytes: single bytes would be taken apart and put together again by the compiler.
# A byte becomes fp16 without a conversion instruction (of which a chip issues few): 0x6400 + code is 1024 + code,
# exactly. Then one subtraction (exact) and one fused multiply-add (one rounding), two numbers an instruction.
HALF_8 = tl.constexpr("""{
.reg .b32 base, a, b;
mov.b32 base, 0x64006400;
prmt.b32 a, $4, base, 0x5150;
prmt.b32 b, $4, base, 0x5352;
sub.f16x2 a, a, base;
sub.f16x2 b, b, base;
fma.rn.f16x2 a, a, $5, $6;
fma.rn.f16x2 b, b, $5, $6;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
}""")


@triton.jit
def in_order(a, b, c, d):
    """``[X, Y, Z]`` four times, one number of every word each, to ``[X, Y, 4 * Z]``: as they lie in memory."""
    x = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(x, (a.shape[0], a.shape[1], 4 * a.shape[2]))


@triton.jit
def twice(x):
    """fp16 to a word that holds it twice."""
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def fused(word, scale, zero):
    """``code * scale + zero`` of words of four codes of 8 bits, in fp16 arithmetic."""
    a, b, c, d = tl.inline_asm_elementwise(
        HALF_8,
        "=h,=h,=h,=h,r,r,r",
        [word, twice(scale), twice(zero)],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=1,
    )
    return in_order(a, b, c, d)


@triton.jit
def dequantize_8(word, scale, zero, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words ``[X, Y, Z]`` of four bytes as numbers ``[X, Y, 4 * Z]``, given scales and zeros ``[X, Y, 1]``.

    The numbers are :func:`exact`, or with ``PTX`` they are computed in fp16 (``DTYPE`` fp16) and rounded once.
    """
    if PTX and not INTERPRETED:
        return fused(word, scale, zero)
    return exact(in_order(word & 255, (word >> 8) & 255, (word >> 16) & 255, word >> 24), scale, zero, DTYPE)


@triton.jit
def dequantize_4(word, scale, zero, high_scale, high_zero, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The low and the high halves of bytes as numbers, like :func:`dequantize_8`."""
    low = dequantize_8(word & 0x0F0F0F0F, scale, zero, DTYPE, PTX)
    return low, dequantize_8((word >> 4) & 0x0F0F0F0F, high_scale, high_zero, DTYPE, PTX)


@triton.jit
def e4m3(code):
    """The numbers of e4m3 codes, in fp32.

    In the place of an fp16 number's bits they are a 256th, small ones with a mantissa only included. No chip needs
    instructions for e4m3 for that, and neither does the interpreter.
    """
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def dequantize_fp8(word, scale, DTYPE: tl.constexpr):
    """Words ``[X, Y, Z]`` of four e4m3 codes as numbers ``[X, Y, 4 * Z]``, given scales ``[X, Y, 1]``."""
    code = in_order(word & 255, (word >> 8) & 255, (word >> 16) & 255, word >> 24)
    return convert(e4m3(code) * scale.to(tl.float32), DTYPE)


@triton.jit
def field(a, b, c, K: tl.constexpr, BITS: tl.constexpr):
    """Code ``K`` of words whose bytes, lowest first, are those of ``a``, ``b`` and ``c``: four words side by side."""
    FIRST: tl.constexpr = K * BITS // 8
    AT: tl.constexpr = K * BITS % 8
    HERE: tl.constexpr = min(BITS, 8 - AT)
    x = a
    y = b
    if FIRST == 1:
        x = b
        y = c
    if FIRST == 2:
        x = c
    code = (x >> AT) & ((2**HERE - 1) * 0x01010101)
    if HERE < BITS:
        code = code | ((y << HERE) & ((2**BITS - 2**HERE) * 0x01010101))
    return code


@triton.jit
def two_fields(a, b, c, K: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """:func:`field` ``K`` and ``K + STEP``, joined."""
    return tl.join(field(a, b, c, K, BITS), field(a, b, c, K + STEP, BITS))


@triton.jit
def fields(a, b, c, BITS: tl.constexpr):
    """All codes of words of 2 or 3 bits, ``[X, Y, Z]`` to ``[X, Y, Z, 4 or 8]``, without an exchange of threads."""
    COUNT: tl.constexpr = 4 if BITS == 2 else 8
    HALF: tl.constexpr = COUNT // 2
    even = two_fields(a, b, c, 0, HALF, BITS)
    odd = two_fields(a, b, c, 1, HALF, BITS)
    if COUNT == 8:
        even = tl.join(even, two_fields(a, b, c, 2, HALF, BITS))
        odd = tl.join(odd, two_fields(a, b, c, 3, HALF, BITS))
    return tl.reshape(tl.join(even, odd), (a.shape[0], a.shape[1], a.shape[2], COUNT))


@triton.jit
def unit_of(low, high):
    """The power of two ``[M]`` below the largest magnitude of each row of two operands: dividing by it is exact."""
    peak = tl.maximum(tl.max(tl.abs(low.to(tl.float32)), 1), tl.max(tl.abs(high.to(tl.float32)), 1))
    bits = peak.to(tl.uint32, bitcast=True) & 0x7F800000
    # Zeros, and magnitudes whose reciprocal would not be a normal number, are left as they are.
    bits = tl.where((bits == 0) | (bits > 0x7E800000), 0x3F800000, bits)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)
