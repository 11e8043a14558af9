"""Causal attention over the paged KV cache: split-KV decode and variable-length prefill.

Twins: torch_decode and torch_prefill of nanovllm.layers.torch_attention. Both kernels follow
FlashAttention-2 (https://arxiv.org/abs/2307.08691): online softmax over tiles of keys, in base 2.

Slots that nothing wrote are never loaded: NaN there would reach the sums as 0 * NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.device import has_fp8, has_tma, prefetch, shared_memory
from nanovllm.kernels.fp8_attention import fp8_attend
from nanovllm.kernels.launch import launch
from nanovllm.kernels.paging import key_places

LOG2_E = 1.4426950408889634


# Not specialised: no value of these may compile the kernel anew.
@triton.jit(do_not_specialize=["table_stride", "min_chunk"])
def _decode_kernel(
    query, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, out, partial,
    partial_lse, counters, scale, query_stride, table_stride, min_chunk,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, COMBINE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for a chunk of a sequence's keys and the GROUP query heads of one K/V head.

    The chunk follows from the context length on the device, so one launch fits all lengths.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    # In elements of the cache; of an FP8 one they are taken in pairs.
    WIDTH: tl.constexpr = HEAD_DIM if k_scales is None else HEAD_DIM // 2
    KV_STRIDE: tl.constexpr = NUM_KV_HEADS * WIDTH
    context_len = tl.load(context_lens + seq)
    # Chunks of equal size, each at least about min_chunk.
    count = tl.minimum(tl.cdiv(context_len, min_chunk), tl.num_programs(1))
    chunk = tl.cdiv(tl.cdiv(context_len, tl.maximum(count, 1)), TILE) * TILE
    used = tl.cdiv(context_len, tl.maximum(chunk, 1))
    start = split * chunk
    end = tl.minimum(start + chunk, context_len)

    dims = tl.arange(0, BLOCK_D)
    dim_mask = (dims < HEAD_DIM)[None, :]
    group = tl.arange(0, ROWS)
    heads = (kv_head * GROUP + group)[:, None] * HEAD_DIM
    head_mask = (group < GROUP)[:, None] & dim_mask
    out += seq.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    table = block_tables + seq.to(tl.int64) * table_stride
    k_head = k_cache + kv_head * WIDTH
    v_head = v_cache + kv_head * WIDTH
    if PDL:
        # While the kernel before still runs: the first tile's keys and values to L2.
        firsts = tl.minimum(start + tl.arange(0, TILE), context_len - 1)
        blocks = tl.load(table + firsts // BLOCK_SIZE, mask=start < context_len, other=0)
        first_slots = blocks.to(tl.int64) * BLOCK_SIZE + firsts % BLOCK_SIZE
        lines = tl.arange(0, LINES) * (WIDTH // LINES)
        if start < context_len:
            prefetch(k_head + first_slots[:, None] * KV_STRIDE + lines[None, :])
            prefetch(v_head + first_slots[:, None] * KV_STRIDE + lines[None, :])
            if k_scales is not None:
                prefetch(k_scales + first_slots * NUM_KV_HEADS + kv_head)
                prefetch(v_scales + first_slots * NUM_KV_HEADS + kv_head)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if start < context_len:
        query += seq.to(tl.int64) * query_stride
        q = tl.load(query + heads + dims[None, :], mask=head_mask, other=0.0)
        if k_scales is not None:
            acc, peak, total = fp8_attend(
                q, k_cache, v_cache, k_scales, v_scales, kv_head, table, start, end, scale,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, PRECISION, STAGES, CONVERTS,
            )  # fmt: skip
        else:
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for first in tl.range(start, end, TILE, num_stages=STAGES):
                in_range = first + tl.arange(0, TILE) < end
                base, slots = key_places(table, first, end, TILE, BLOCK_SIZE)
                offsets = slots[:, None] * KV_STRIDE + dims[None, :]
                key_mask = in_range[:, None] & dim_mask
                k = tl.load(k_head + base * KV_STRIDE + offsets, mask=key_mask, other=0.0)
                scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
                scores = tl.where(in_range[None, :], scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, axis=1))
                p = tl.exp2(scores - new_peak[:, None])
                rescale = tl.exp2(peak - new_peak)
                total = total * rescale + tl.sum(p, axis=1)
                v = tl.load(v_head + base * KV_STRIDE + offsets, mask=key_mask, other=0.0)
                acc = acc * rescale[:, None]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                peak = new_peak
        acc = acc / total[:, None]

        if used == 1:
            tl.store(out + heads + dims[None, :], acc, mask=head_mask)
        else:
            # The last of the chunks' programs to get here combines what all have written.
            pair = seq * NUM_KV_HEADS + kv_head
            partial += pair.to(tl.int64) * (tl.num_programs(1) * GROUP * HEAD_DIM)
            partial_lse += pair * (tl.num_programs(1) * GROUP)
            mine = (split * GROUP + group)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(partial + mine, acc, mask=head_mask)
            tl.store(partial_lse + split * GROUP + group, peak + tl.log2(total), mask=group < GROUP)
            tl.debug_barrier()  # all threads have written before one of them counts
            if tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu") == used - 1:
                tl.store(counters + pair, 0)  # for the next launch
                _combine(
                    partial, partial_lse, out + kv_head * (GROUP * HEAD_DIM), used, GROUP, HEAD_DIM,
                    BLOCK_G, BLOCK_D, COMBINE,
                )  # fmt: skip
    elif (context_len == 0) & (split == 0):
        tl.store(out + heads + dims[None, :], tl.zeros([ROWS, BLOCK_D], tl.float32), mask=head_mask)


@triton.jit
def _combine(
    partial, partial_lse, out, used, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Weigh the chunks' outputs by their share of the softmax's sum, COMBINE chunks at a time."""
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    group_mask = group < GROUP
    mask = group_mask[:, None] & (dims < HEAD_DIM)[None, :]
    places = group[:, None] * HEAD_DIM + dims[None, :]
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in tl.range(0, used, COMBINE, num_stages=1):
        chunks = first + tl.arange(0, COMBINE)
        # .cg: from L2, where the other programs' writes are.
        x = tl.load(
            partial + chunks[:, None, None] * (GROUP * HEAD_DIM) + places[None, :, :],
            mask=(chunks < used)[:, None, None] & mask[None, :, :], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        lse = tl.load(
            partial_lse + chunks[:, None] * GROUP + group[None, :],
            mask=(chunks < used)[:, None] & group_mask[None, :], other=float("-inf"),
            cache_modifier=".cg",
        )  # fmt: skip
        new_peak = tl.where(group_mask, tl.maximum(peak, tl.max(lse, axis=0)), 0.0)
        weights = tl.exp2(lse - new_peak[None, :])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * x, axis=0)
        peak = new_peak
    acc = acc / tl.where(group_mask, total, 1.0)[:, None]
    tl.store(out + places, acc, mask=mask)


class DecodePlan(NamedTuple):
    """How decode divides its work: chunks of at least `min_chunk` keys, at most `num_splits`."""

    num_splits: int
    min_chunk: int
    tile: int = 64
    num_warps: int = 4
    num_stages: int = 2


# By the most pairs of a sequence and a K/V head that each is for. Measured on an H100, with equal
# lengths and with mixed ones, the longest first.
DECODE_PLANS = {
    16: DecodePlan(64, 64),
    64: DecodePlan(32, 64, tile=32, num_warps=2),
    256: DecodePlan(16, 128, tile=32, num_warps=2, num_stages=5),
    1024: DecodePlan(8, 768, num_stages=5),
    2**31: DecodePlan(8, 1024, num_stages=5),
}
# For an FP8 cache; with as many splits, since one workspace serves both. Measured on an H100: 1 to
# 64 sequences of 1,000 keys, 256 of 570, with 8 K/V heads.
FP8_DECODE_PLANS = {
    16: DecodePlan(64, 128, tile=128, num_stages=3),
    64: DecodePlan(32, 128, num_warps=2),
    256: DecodePlan(16, 128, tile=32, num_warps=1, num_stages=3),
    2**31: DecodePlan(8, 1024, num_warps=2),
}


def decode_plan(num_seqs: int, num_kv_heads: int, head_dim: int, fp8: bool = False) -> DecodePlan:
    """A plan that depends on static sizes alone, so that a captured graph keeps it.

    Few sequences need many small chunks to occupy every SM; many need few, since each costs an
    exchange through memory. Chunks of a long context grow, so the cost follows its length.
    """
    pairs = num_seqs * num_kv_heads
    plans = FP8_DECODE_PLANS if fp8 else DECODE_PLANS
    plan = next(plan for limit, plan in plans.items() if pairs <= limit)
    return plan if head_dim <= 128 else plan._replace(tile=32)


class DecodeWorkspace(NamedTuple):
    """Where chunks leave their results: float32 outputs and log-sums, int32 counters (zero)."""

    partial: Tensor
    lse: Tensor
    counters: Tensor


def decode_workspace(
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    num_splits: int | None = None,
) -> DecodeWorkspace:
    """A workspace for any number of sequences up to max_num_seqs.

    Launches that may overlap in time (other than in one stream) must not share it.
    """
    rows = 0
    for num_seqs in range(1, max_num_seqs + 1):
        plan = decode_plan(num_seqs, num_kv_heads, head_dim)
        rows = max(rows, num_seqs * (num_splits or plan.num_splits) * num_heads)
    return DecodeWorkspace(
        torch.empty(rows * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.zeros(max_num_seqs * num_kv_heads, dtype=torch.int32, device=device),
    )


def paged_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    plan: DecodePlan | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence to its cached keys.

    Twin: layers.torch_attention.torch_decode.

    The launch depends on no context length, so a CUDA graph of it stays valid; its cost follows
    the lengths.

    Args:
        query: [num_seqs, num_heads, head_dim]; each row contiguous.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; head_dim and
            block_size multiples of 16.
        block_tables: int32 [num_seqs, max_blocks].
        context_lens: int32 [num_seqs], this step's token counted in; 0 = padding, its output is 0.
        workspace: from decode_workspace; None allocates one, which costs a launch.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].

    Returns:
        [num_seqs, num_heads, head_dim] in query's dtype: `out`, if given.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    device = query.device
    out = torch.empty(query.shape, dtype=query.dtype, device=device) if out is None else out
    assert query.stride()[1:] == (head_dim, 1) and block_tables.stride(1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and out.is_contiguous()
    assert head_dim % 16 == 0 and block_size % 16 == 0 and num_heads % num_kv_heads == 0
    plan = plan or decode_plan(num_seqs, num_kv_heads, head_dim, k_scales is not None)
    assert plan.min_chunk % plan.tile == 0
    if workspace is None:
        workspace = decode_workspace(
            num_seqs, num_heads, num_kv_heads, head_dim, device, plan.num_splits
        )
    assert workspace.lse.numel() >= num_seqs * num_heads * plan.num_splits
    if k_scales is not None:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    elements = 4096 if plan.num_warps > 1 else 2048
    combine = max(1, min(16, elements // (block_group * triton.next_power_of_2(head_dim))))
    launch(
        _decode_kernel, (num_kv_heads, plan.num_splits, num_seqs), query,
        query, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, out, *workspace,
        scale * LOG2_E, query.stride(0), block_tables.stride(0), plan.min_chunk,
        GROUP=group, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE=plan.tile, ROWS=max(16 if k_scales is None else 8, block_group), BLOCK_G=block_group,
        BLOCK_D=triton.next_power_of_2(head_dim), COMBINE=combine,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", STAGES=plan.num_stages,
        LINES=max(1, triton.next_power_of_2(k_cache.size(3)) * k_cache.element_size() // 128),
        CONVERTS=has_fp8(query.device), num_warps=plan.num_warps,
    )  # fmt: skip
    return out


@triton.jit
def _prefill_tiles(
    acc, peak, total, q, key, value, k_start, column, table, start, end, rows_limit, scale, dims,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to keys start .. end - 1; DIAGONAL: row r only to those up to rows_limit[r]."""
    for first in tl.range(start, end, KEYS, num_stages=STAGES):
        positions = first + tl.arange(0, KEYS)
        in_range = positions < end
        if TMA:
            # Padding of head_dim is the next head's: there q is 0, and the output is not stored.
            k = key.load([k_start + first, column]).T
            v = value.load([k_start + first, column])
            if DIAGONAL:  # what follows is another sequence's, where even NaN must do no harm
                v = tl.where(in_range[:, None], v, 0.0)
        else:
            if BLOCK_SIZE == 0:
                base, slots = k_start.to(tl.int64) + first, tl.arange(0, KEYS)
            else:
                base, slots = key_places(table, first, end, KEYS, BLOCK_SIZE)
            k_pointers = key + base * KEY_STRIDE + column
            k_pointers += (slots * KEY_STRIDE)[None, :] + dims[:, None]
            v_pointers = value + base * VALUE_STRIDE + column
            v_pointers += (slots * VALUE_STRIDE)[:, None] + dims[None, :]
            # Off the diagonal all keys exist: no mask, unless head_dim is padded.
            if DIAGONAL:
                k_mask = in_range[None, :] & (dims < HEAD_DIM)[:, None]
                v_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
                k = tl.load(k_pointers, mask=k_mask, other=0.0)
                v = tl.load(v_pointers, mask=v_mask, other=0.0)
            elif dims.shape[0] == HEAD_DIM:
                k = tl.load(k_pointers)
                v = tl.load(v_pointers)
            else:
                k = tl.load(k_pointers, mask=(dims < HEAD_DIM)[:, None], other=0.0)
                v = tl.load(v_pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if DIAGONAL:
            visible = positions[None, :] <= rows_limit[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    query, key, value, out, cu_seqlens_q, cu_seqlens_k, block_tables, scale, query_stride,
    table_stride, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for QUERIES queries of one head.

    BLOCK_SIZE 0: keys lie as the queries do; else in the caches. TMA: `key` and `value` are
    descriptors of [num_keys, num_kv_heads * HEAD_DIM]; else pointers.
    """
    head = tl.program_id(0)
    seq = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    q_start = tl.load(cu_seqlens_q + seq).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q + seq + 1) - q_start).to(tl.int32)
    k_start = tl.load(cu_seqlens_k + seq)
    num_keys = tl.load(cu_seqlens_k + seq + 1) - k_start
    # The last queries first: they attend to the most keys.
    tile = tl.cdiv(num_queries, QUERIES) - 1 - tl.program_id(1)
    if tile >= 0:
        dims = tl.arange(0, BLOCK_D)
        rows = tile * QUERIES + tl.arange(0, QUERIES)
        mask = (rows < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
        tokens = (q_start + rows)[:, None]
        q = tl.load(
            query + tokens * query_stride + head * HEAD_DIM + dims[None, :], mask=mask, other=0.0
        )
        column = head // GROUP * HEAD_DIM
        table = block_tables
        if BLOCK_SIZE > 0:
            table += seq.to(tl.int64) * table_stride
        # Query r attends to keys up to num_keys - num_queries + r.
        first_limit = num_keys - num_queries + tile * QUERIES
        rows_limit = first_limit + tl.arange(0, QUERIES)
        diagonal = (first_limit + 1) // KEYS * KEYS
        end = tl.minimum(first_limit + QUERIES, num_keys)
        acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc, peak, total = _prefill_tiles(
            acc, peak, total, q, key, value, k_start, column, table, 0, diagonal, rows_limit, scale,
            dims, KEY_STRIDE, VALUE_STRIDE, HEAD_DIM, BLOCK_SIZE, KEYS, TMA, False, PRECISION,
            STAGES,
        )  # fmt: skip
        acc, peak, total = _prefill_tiles(
            acc, peak, total, q, key, value, k_start, column, table, diagonal, end, rows_limit,
            scale, dims, KEY_STRIDE, VALUE_STRIDE, HEAD_DIM, BLOCK_SIZE, KEYS, TMA, True, PRECISION,
            STAGES,
        )  # fmt: skip
        pointers = out + tokens * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
        tl.store(pointers, acc / total[:, None], mask=mask)


class PrefillTiles(NamedTuple):
    """Queries and keys a tile, warps, and tiles of keys in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By head_dim (padded to a power of two), for 16-bit elements: where a program can have 160 KiB of
# shared memory or more (sm_80, sm_90, sm_100), and where it has 99 KiB (sm_86, sm_89, sm_120).
# Measured on an H100 for head_dim 128 only.
PREFILL_TILES = {
    32: (PrefillTiles(64, 64, 4, 3), PrefillTiles(64, 64, 4, 3)),
    64: (PrefillTiles(64, 64, 4, 3), PrefillTiles(64, 64, 4, 2)),
    128: (PrefillTiles(64, 64, 4, 3), PrefillTiles(128, 64, 8, 2)),
    256: (PrefillTiles(128, 32, 8, 2), PrefillTiles(64, 32, 8, 2)),
}
# From the cache, prompts of more queries gain from reading it less often.
LONG_QUERIES = 1024
LONG_PAGED_TILES = {128: PrefillTiles(128, 128, 8, 2)}
FLOAT32_TILES = PrefillTiles(32, 32, 4, 1)


def prefill_tiles(
    head_dim: int, dtype: torch.dtype, shared_bytes: int, long_paged: bool = False
) -> PrefillTiles:
    """The tiles for a head_dim, where a program can have so much shared memory."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    padded = triton.next_power_of_2(head_dim)
    large, small = PREFILL_TILES[padded]
    if shared_bytes < 160 * 1024:
        return small
    return LONG_PAGED_TILES.get(padded, large) if long_paged else large


def paged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_query_len: int,
    scale: float,
    block_tables: Tensor | None = None,
    tiles: PrefillTiles | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of sequences that lie in a row. Twin: layers.torch_attention.torch_prefill.

    Query i of a sequence with q queries and k keys attends to keys 0 .. k - q + i.

    Args:
        query: [num_tokens, num_heads, head_dim]; each row contiguous.
        key, value: [num_keys, num_kv_heads, head_dim], rows contiguous; or, with block_tables, the
            caches [num_blocks, block_size, num_kv_heads, head_dim]. head_dim and block_size are
            multiples of 16.
        cu_seqlens_q, cu_seqlens_k: int32 [num_seqs + 1], running sums of queries and keys.
        max_query_len: the most queries of one sequence.
        block_tables: int32 [num_seqs, max_blocks].

    Returns:
        [num_tokens, num_heads, head_dim] in query's dtype: `out`, if given.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key.size(-2)
    block_size = key.size(1) if block_tables is not None else 0
    block_d = triton.next_power_of_2(head_dim)
    assert head_dim % 16 == 0 and block_size % 16 == 0 and num_heads % num_kv_heads == 0
    assert query.stride()[1:] == (head_dim, 1)
    if tiles is None:
        long_paged = block_size > 0 and max_query_len > LONG_QUERIES
        tiles = prefill_tiles(head_dim, query.dtype, shared_memory(query.device), long_paged)
    if block_tables is not None:
        assert key.is_contiguous() and value.is_contiguous() and block_tables.stride(1) == 1
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    assert all(x.stride()[1:] == (head_dim, 1) for x in (key, value))
    tma = block_tables is None and has_tma(query.device)
    keys: Tensor | TensorDescriptor = key
    values: Tensor | TensorDescriptor = value
    if tma:
        shape = [len(key), num_kv_heads * head_dim]
        keys, values = (
            TensorDescriptor(x, shape, [x.stride(0), 1], [tiles.keys, block_d])
            for x in (key, value)
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    assert out.is_contiguous()
    num_seqs = len(cu_seqlens_q) - 1
    launch(
        _prefill_kernel, (num_heads, triton.cdiv(max_query_len, tiles.queries), num_seqs), query,
        query, keys, values, out, cu_seqlens_q, cu_seqlens_k, block_tables, scale * LOG2_E,
        query.stride(0), block_tables.stride(0) if block_tables is not None else 0,
        NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim,
        KEY_STRIDE=key.stride(0), VALUE_STRIDE=value.stride(0), BLOCK_SIZE=block_size,
        QUERIES=tiles.queries, KEYS=tiles.keys, BLOCK_D=block_d, TMA=tma,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
