"""Attention to an FP8 cache: the loop over tiles of keys that decode and prefill share.

See nanovllm.kernels.attention, whose kernels call it. Two columns of K and V are a pair of bytes,
and a tile of pairs becomes two tiles of columns, the even ones and the odd ones: so queries and
outputs are two tiles as well.

A key's scale multiplies its scores, a value's scale its weight. In float16 such a weight must
neither overflow nor vanish: so the peak that weights are relative to is that of scores plus the
scale's exponent, by which the largest weight with its scale is 1.
"""

import triton
import triton.language as tl

from nanovllm.kernels.kv_quantization import power_of_two, unpack_pairs
from nanovllm.kernels.paging import key_slots

# Exponents beyond count as these: float32 holds weights of up to 2^30 without their scale.
MOST_SHIFT = tl.constexpr(30.0)


@triton.jit
def fp8_queries(q, scale, CONVERSION: tl.constexpr) -> tuple[tl.tuple, tl.tensor]:
    """Even and odd columns of q [rows, head_dim], and what to multiply scores with.

    scale: of the softmax. Rows that become float16 are brought to 2^14 and somewhat more; then the
    factors are [rows, 1].
    """
    factor = scale if CONVERSION == "hardware" else scale * 256.0
    if CONVERSION != "bits" and q.dtype == tl.bfloat16:
        x = q.to(tl.float32)
        peak = tl.max(tl.abs(x), axis=1)[:, None]
        exponents = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 16), 253)
        q = (x * power_of_two(127 + 14 + 127 - exponents)).to(tl.float16)
        factor = factor * power_of_two(exponents - 14)
    even, odd = tl.split(tl.reshape(q, [q.shape[0], q.shape[1] // 2, 2]))
    return (even, odd), factor


@triton.jit
def fp8_attend(
    even, odd, peak, total, q, factor, caches, kv_head, table, start, end, limits,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr, CONVERSION: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attend to keys start .. end - 1; MASKED: row r only to those up to limits[r].

    even, odd: columns of the sums, float32 [rows, head_dim / 2], over 256 but for "hardware".
    q, factor: from fp8_queries. caches: K and V as int16, and the exponents of their scales.
    """
    k_cache, v_cache, k_scales, v_scales = caches
    q_even, q_odd = q
    dtype: tl.constexpr = q_even.dtype
    HARDWARE: tl.constexpr = CONVERSION == "hardware"
    WIDTH: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, even.shape[1])
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        positions = first + tl.arange(0, TILE)
        in_range = positions < end
        rows = key_slots(table, first, end, TILE, BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        places = rows[:, None] * WIDTH + pairs[None, :]
        mask = (pairs < WIDTH)[None, :]
        if MASKED:
            mask = mask & in_range[:, None]
        # Exponents before what they belong to, which is waited for.
        k_exponents = tl.load(k_scales + rows, mask=in_range, other=0).to(tl.int32)
        v_exponents = tl.load(v_scales + rows, mask=in_range, other=0).to(tl.int32)
        k_even, k_odd = unpack_pairs(tl.load(k_cache + places, mask=mask, other=0), dtype, HARDWARE)
        scores = tl.dot(q_even, k_even.T, input_precision=PRECISION)
        scores = tl.dot(q_odd, k_odd.T, scores, input_precision=PRECISION)
        scores = scores * (power_of_two(k_exponents)[None, :] * factor)
        if MASKED:
            scores = tl.where(positions[None, :] <= limits[:, None], scores, float("-inf"))
        shifted = scores
        if dtype == tl.float16:
            shift = (v_exponents - 127).to(tl.float32)
            shifted += tl.minimum(tl.maximum(shift, -MOST_SHIFT), MOST_SHIFT)[None, :]
        new_peak = tl.maximum(peak, tl.max(shifted, axis=1))
        p = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        p = (p * power_of_two(v_exponents)[None, :]).to(dtype)
        v_even, v_odd = unpack_pairs(tl.load(v_cache + places, mask=mask, other=0), dtype, HARDWARE)
        even = tl.dot(p, v_even, even * rescale[:, None], input_precision=PRECISION)
        odd = tl.dot(p, v_odd, odd * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return even, odd, peak, total


@triton.jit
def fp8_output(even, odd, total, CONVERSION: tl.constexpr) -> tl.tensor:
    """Attention [rows, head_dim], of what fp8_attend gives."""
    unit: tl.constexpr = 1.0 if CONVERSION == "hardware" else 256.0
    out = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    return out * (unit / total)[:, None]
