"""K and V in one byte an element, within kernels. Twin: nanovllm.layers.kv_quantization.

Nothing here needs a GPU that knows FP8: e4m3 is made with integer instructions, and read with them
where no others are.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def magnitudes(x) -> tl.tensor:
    """|x| as integers int32, which are in the same order; NaN the last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_exponents(peaks) -> tl.tensor:
    """Of rows whose largest magnitude is so much: int32, 1 to 247, or 255."""
    exponents = tl.maximum(((peaks + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(peaks < 0x7F800000, exponents, 255)


@triton.jit
def power_of_two(exponents) -> tl.tensor:
    """The float32 that exponents (int32) stand for: 0.0 for 0, NaN for 255."""
    bits = tl.where(exponents == 255, 0x7FC00000, exponents << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(x, exponents) -> tuple[tl.tensor, tl.tensor]:
    """The bytes (uint8) that hold x at a scale, and what they hold, float32."""
    y = x.to(tl.float32) * power_of_two(254 - exponents)
    size = magnitudes(y)
    # To three bits behind the first one, ties to even.
    coarse = tl.minimum(size, 0x7F800000) + 0x7FFFF + ((size >> 20) & 1)
    # Below 2^-6, e4m3's subnormals: to multiples of 2^-9, as which a float32 from 2^14 on counts.
    is_small = size < 0x3C800000
    fine = size.to(tl.float32, bitcast=True) + 16384.0
    steps = fine.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(is_small, steps, (coarse >> 20) - 960), 0x7F)
    rounded = (coarse & 0x7FF00000).to(tl.float32, bitcast=True)
    rounded = tl.where(is_small, fine - 16384.0, rounded)
    is_negative = y.to(tl.int32, bitcast=True) < 0
    code = tl.where(is_negative, code + 0x80, code).to(tl.uint8)
    return code, tl.where(is_negative, -rounded, rounded) * power_of_two(exponents)


@triton.jit
def unpack_pairs(pairs, dtype: tl.constexpr, CONVERTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second of pairs (int16) of e4m3 numbers, exactly.

    Pairs, because a product's operands are 16 bits wide: such a tile comes from shared memory as a
    16-bit one does, also transposed, and becomes two in the same layout.

    Args:
        dtype: float16, or float32.
        CONVERTS: the GPU converts FP8 to float16. Elsewhere a number's sign goes to the sign, its
            other bits to where exponent and mantissa meet: that is the number times 1 / 256,
            subnormals too, but for NaN.
    """
    if INTERPRETED or dtype == tl.float32:
        pairs = pairs.to(tl.int32)
        return (unpack(pairs) * 2.0**120).to(dtype), (unpack(pairs >> 8) * 2.0**120).to(dtype)
    elif CONVERTS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            .reg .b16 l, h;
            prmt.b32 t, $2, $2, 0x3120;
            mov.b32 {l, h}, t;
            cvt.rn.f16x2.e4m3x2 $0, l;
            cvt.rn.f16x2.e4m3x2 $1, h;
            }""", "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, factor, zero;
            mov.b32 factor, 0x5c005c00;
            mov.b32 zero, 0x80008000;
            shl.b32 t, $2, 8;
            shl.b32 u, $2, 7;
            and.b32 u, u, 0x3f803f80;
            lop3.b32 t, t, 0x80008000, u, 0xEA;
            fma.rn.f16x2 $0, t, factor, zero;
            shr.u32 u, $2, 1;
            and.b32 u, u, 0x3f803f80;
            lop3.b32 t, $2, 0x80008000, u, 0xEA;
            fma.rn.f16x2 $1, t, factor, zero;
            }""", "=&r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def unpack(byte) -> tl.tensor:
    """The number in the lowest byte of int32, times 2^-120: float32."""
    return (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True)
