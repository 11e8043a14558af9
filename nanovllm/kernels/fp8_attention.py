"""Attention to an FP8 cache: a decode reads it, for a prefill K and V are gathered.

A decode (_decode_kernel of nanovllm.kernels.attention) reads each key once, so it is the bytes read
that count, and next the instructions that make 16 bits of them. In a prefill many queries would
each make the same numbers of them anew.

Two columns of K and V are a pair of bytes, and a tile of pairs becomes two tiles of columns, the
even ones and the odd ones: so queries and outputs are two tiles as well. Keys and columns are the
rows of the products, query heads their columns: of those 8 are enough for a tensor core.

Products are of float16, which an e4m3 number becomes in fewer instructions than bfloat16. So
queries are scaled to fit, by a power of two. A key's scale multiplies its scores, a value's scale
its weight, which must neither overflow nor vanish: the peak that weights are relative to is that of
scores plus the scale's exponent, by which the largest weight with its scale is 1.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.kv_quantization import magnitudes, power_of_two, unpack, unpack_pairs
from nanovllm.kernels.launch import launch
from nanovllm.kernels.paging import key_places

# Queries are scaled so that the largest of a group's numbers has this exponent (of base 2).
Q_EXPONENT = tl.constexpr(14)
# Less counts as this: weights without their scale are at most 2^100, and float32 holds their sum.
LEAST_SHIFT = tl.constexpr(-100)
GATHERED_ROWS = 64  # a program


@triton.jit
def fp8_attend(
    q, k_cache, v_cache, k_scales, v_scales, kv_head, table, start, end, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, CONVERTS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attend to keys start .. end - 1 of a sequence.

    q: [heads, head_dim]. k_cache, v_cache: as int16, with the exponents of their scales.

    Returns:
        float32: weighted sums of values [heads, head_dim]; [heads], the peak of the scores, in base
        2, that weights are relative to; [heads], the weights' sums.
    """
    HEADS: tl.constexpr = q.shape[0]
    PAIRS: tl.constexpr = q.shape[1] // 2
    WIDTH: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    if dtype == tl.float16:
        largest = tl.max(tl.max(magnitudes(q), axis=1), axis=0)
        exponent = tl.maximum(largest >> 23, Q_EXPONENT + 1)
        q = q.to(tl.float32) * ((254 - exponent + Q_EXPONENT) << 23).to(tl.float32, bitcast=True)
        scale *= ((exponent - Q_EXPONENT) << 23).to(tl.float32, bitcast=True)
    q_even, q_odd = tl.split(tl.reshape(q.to(dtype), [HEADS, PAIRS, 2]))
    pairs = tl.arange(0, PAIRS)
    k_cache += kv_head * WIDTH
    v_cache += kv_head * WIDTH
    k_scales += kv_head
    v_scales += kv_head
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    totals = tl.zeros([TILE, HEADS], tl.float32)
    even = tl.zeros([PAIRS, HEADS], tl.float32)
    odd = tl.zeros([PAIRS, HEADS], tl.float32)
    last = (end - 1) // TILE * TILE
    k_next, v_next = _exponents(
        k_scales, v_scales, table, start, end, NUM_KV_HEADS, TILE, BLOCK_SIZE
    )
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        k_exponents, v_exponents = k_next.to(tl.int32), v_next.to(tl.int32)
        # A tile ahead, since nothing else hides how long they take.
        following = tl.minimum(first + TILE, last)
        k_next, v_next = _exponents(
            k_scales, v_scales, table, following, end, NUM_KV_HEADS, TILE, BLOCK_SIZE
        )
        in_range = first + tl.arange(0, TILE) < end
        base, slots = key_places(table, first, end, TILE, BLOCK_SIZE)
        base *= NUM_KV_HEADS * WIDTH
        places = slots * (NUM_KV_HEADS * WIDTH)
        mask = in_range[:, None] & (pairs < WIDTH)[None, :]
        keys = tl.load(k_cache + base + (places[:, None] + pairs[None, :]), mask=mask, other=0)
        k_even, k_odd = unpack_pairs(keys, dtype, CONVERTS)
        scores = tl.dot(k_even, q_even.T, input_precision=PRECISION)
        scores = tl.dot(k_odd, q_odd.T, scores, input_precision=PRECISION)
        scores = scores * (power_of_two(k_exponents) * scale)[:, None]
        scores = tl.where(in_range[:, None], scores, float("-inf"))
        shifted = scores
        if dtype == tl.float16:
            shifted += tl.maximum(v_exponents - 127, LEAST_SHIFT).to(tl.float32)[:, None]
        new_peak = tl.maximum(peak, tl.max(shifted, axis=0))
        p = tl.exp2(scores - new_peak[None, :])
        rescale = tl.exp2(peak - new_peak)[None, :]
        totals = totals * rescale + p
        p = (p * power_of_two(v_exponents)[:, None]).to(dtype)
        mask = (pairs < WIDTH)[:, None] & in_range[None, :]
        values = tl.load(v_cache + base + (pairs[:, None] + places[None, :]), mask=mask, other=0)
        v_even, v_odd = unpack_pairs(values, dtype, CONVERTS)
        even = tl.dot(v_even, p, even * rescale, input_precision=PRECISION)
        odd = tl.dot(v_odd, p, odd * rescale, input_precision=PRECISION)
        peak = new_peak
    sums = tl.reshape(tl.join(even.T, odd.T), [HEADS, 2 * PAIRS])
    return sums, peak, tl.sum(totals, axis=0)


@triton.jit
def _exponents(
    k_scales, v_scales, table, first, end, NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Those of a tile of keys and of its values, uint8 [TILE]."""
    base, slots = key_places(table, first, end, TILE, BLOCK_SIZE)
    rows = base * NUM_KV_HEADS + slots * NUM_KV_HEADS
    in_range = first + tl.arange(0, TILE) < end
    k_exponents = tl.load(k_scales + rows, mask=in_range, other=0)
    return k_exponents, tl.load(v_scales + rows, mask=in_range, other=0)


@triton.jit(do_not_specialize=["table_stride"])
def _gather_kernel(
    k_cache, v_cache, k_scales, v_scales, key, value, block_tables, cu_seqlens_k, table_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows, each a head of a key, of a sequence."""
    seq = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    start = tl.load(cu_seqlens_k + seq)
    num_rows = (tl.load(cu_seqlens_k + seq + 1) - start) * NUM_KV_HEADS
    if first < num_rows:
        rows = first + tl.arange(0, ROWS)
        in_range = rows < num_rows
        positions = rows // NUM_KV_HEADS
        table = block_tables + seq.to(tl.int64) * table_stride
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=in_range, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        sources = slots * NUM_KV_HEADS + rows % NUM_KV_HEADS
        targets = start.to(tl.int64) * NUM_KV_HEADS + rows
        _dequantize(k_cache, k_scales, key, sources, targets, in_range, HEAD_DIM, BLOCK_D)
        _dequantize(v_cache, v_scales, value, sources, targets, in_range, HEAD_DIM, BLOCK_D)


@triton.jit
def _dequantize(
    cache, scales, out, sources, targets, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows `sources` of a cache, to rows `targets` of out."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = in_range[:, None] & (dims < HEAD_DIM)
    stored = tl.load(cache + sources[:, None] * HEAD_DIM + dims, mask=mask, other=0)
    factor = power_of_two(tl.load(scales + sources, mask=in_range, other=0).to(tl.int32))
    numbers = unpack(stored.to(tl.int32)) * 2.0**120 * factor[:, None]
    tl.store(out + targets[:, None] * HEAD_DIM + dims, numbers, mask=mask)


def gather(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_tables: Tensor,
    cu_seqlens_k: Tensor,
    max_key_len: int,
    key: Tensor,
    value: Tensor,
) -> None:
    """What an FP8 cache holds of sequences, to rows in a row.

    Twin: dequantize of nanovllm.layers.kv_quantization, of their slots.

    Args:
        k_cache, v_cache: uint8 [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        k_scales, v_scales: uint8 [num_blocks, block_size, num_kv_heads], contiguous.
        block_tables: int32 [num_seqs, max_blocks].
        cu_seqlens_k: int32 [num_seqs + 1], running sum of the sequences' keys.
        max_key_len: the most keys of one sequence.
        key, value: [num_keys, num_kv_heads, head_dim], contiguous, are written.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    caches = k_cache, v_cache, k_scales, v_scales
    assert all(x.is_contiguous() for x in (*caches, key, value)) and block_tables.stride(1) == 1
    num_tiles = triton.cdiv(max_key_len * num_kv_heads, GATHERED_ROWS)
    launch(
        _gather_kernel, (num_tiles, len(block_tables)), key,
        *caches, key, value, block_tables, cu_seqlens_k, block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, ROWS=GATHERED_ROWS,
        BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
