"""Attention to an FP8 cache: a decode reads it, for a prefill K and V are gathered.

A decode (_decode_kernel of nanovllm.kernels.attention) reads each key once, so it is the bytes read
that count. In a prefill many queries would each make the same numbers of them anew.

Two columns of K and V are a pair of bytes, and a tile of pairs becomes two tiles of columns, the
even ones and the odd ones: so queries and outputs are two tiles as well.

A key's scale multiplies its scores, a value's scale its weight. In float16 such a weight must
neither overflow nor vanish: so the peak that weights are relative to is that of scores plus the
scale's exponent, by which the largest weight with its scale is 1.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.kv_quantization import power_of_two, unpack, unpack_pairs
from nanovllm.kernels.launch import launch
from nanovllm.kernels.paging import key_slots

# Exponents beyond count as these: float32 holds weights of up to 2^30 without their scale.
MOST_SHIFT = tl.constexpr(30.0)
GATHERED_ROWS = 64  # a program


@triton.jit
def fp8_attend(
    q, k_cache, v_cache, k_scales, v_scales, kv_head, table, start, end, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attend to keys start .. end - 1 of a sequence.

    q: [rows, head_dim]. k_cache, v_cache: as int16, with the exponents of their scales.

    Returns:
        float32: weighted sums of values [rows, head_dim]; [rows], the peak of the scores, in base
        2, that weights are relative to; [rows], the weights' sums.
    """
    ROWS: tl.constexpr = q.shape[0]
    PAIRS: tl.constexpr = q.shape[1] // 2
    WIDTH: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = q.dtype
    q_even, q_odd = tl.split(tl.reshape(q, [ROWS, PAIRS, 2]))
    pairs = tl.arange(0, PAIRS)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    even = tl.zeros([ROWS, PAIRS], tl.float32)
    odd = tl.zeros([ROWS, PAIRS], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        in_range = first + tl.arange(0, TILE) < end
        rows = key_slots(table, first, end, TILE, BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        places = rows[:, None] * WIDTH + pairs[None, :]
        mask = in_range[:, None] & (pairs < WIDTH)[None, :]
        # Exponents before what they belong to, which is waited for.
        k_exponents = tl.load(k_scales + rows, mask=in_range, other=0).to(tl.int32)
        v_exponents = tl.load(v_scales + rows, mask=in_range, other=0).to(tl.int32)
        k_even, k_odd = unpack_pairs(tl.load(k_cache + places, mask=mask, other=0), dtype)
        scores = tl.dot(q_even, k_even.T, input_precision=PRECISION)
        scores = tl.dot(q_odd, k_odd.T, scores, input_precision=PRECISION)
        scores = scores * (power_of_two(k_exponents)[None, :] * (scale * 256.0))
        scores = tl.where(in_range[None, :], scores, float("-inf"))
        shifted = scores
        if dtype == tl.float16:
            shift = (v_exponents - 127).to(tl.float32)
            shifted += tl.minimum(tl.maximum(shift, -MOST_SHIFT), MOST_SHIFT)[None, :]
        new_peak = tl.maximum(peak, tl.max(shifted, axis=1))
        p = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        p = (p * power_of_two(v_exponents)[None, :]).to(dtype)
        v_even, v_odd = unpack_pairs(tl.load(v_cache + places, mask=mask, other=0), dtype)
        even = tl.dot(p, v_even, even * rescale[:, None], input_precision=PRECISION)
        odd = tl.dot(p, v_odd, odd * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    sums = tl.reshape(tl.join(even, odd), [ROWS, 2 * PAIRS])
    return sums * 256.0, peak, total


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
