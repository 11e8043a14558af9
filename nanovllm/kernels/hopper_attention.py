"""Causal attention of long prefills on Hopper. Twin: layers.torch_attention.torch_prefill.

Follows FlashAttention-3 (https://arxiv.org/abs/2407.08608): two warp groups with half a tile of
queries each, so that one's softmax and the other's matrix products overlap; and within a group the
scores of the next keys are computed beside the values' product of these.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.attention import LOG2_E
from nanovllm.kernels.device import is_hopper, num_sms
from nanovllm.kernels.hopper import async_load, descriptor, new_barriers
from nanovllm.kernels.launch import launch
from nanovllm.utils.context import QUERY_TILE

# Measured on an H100.
MIN_TOKENS = 4096
MIN_TILES_A_SEQUENCE = 3
SUPPORTED_HEAD_DIM = 128
KEY_TILE = 128
NUM_STAGES = 2
TILE_FIELDS = gl.constexpr(6)


@gluon.jit
def _tile_of(item, tiles, NUM_HEADS: gl.constexpr):
    """Row of `tiles` (see utils.context.cut_queries) and head. Heads of one K/V are neighbours."""
    return tiles + item // NUM_HEADS * TILE_FIELDS, item % NUM_HEADS


@gluon.jit
def _zero_rows(tile, num_kept):
    """Overwrite the rows of a tile in shared memory from num_kept on; by one warp."""
    HEIGHT: gl.constexpr = tile.shape[0]
    ROWS: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0])
    for first in gl.static_range(0, HEIGHT, ROWS):
        if first + ROWS > num_kept:
            part = tile.slice(first, ROWS)
            rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            values = part.load(layout)
            values = gl.where((rows < num_kept).expand_dims(1), values, 0.0).to(values.dtype)
            part.store(values)
    fence_async_shared()


@gluon.jit
def _load_tiles(
    query, key, value, tiles, block_tables, num_items, table_stride, queries, keys, values, tail,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """The producer."""
    q_ring, q_full, q_empty = queries
    k_ring, k_full, k_empty = keys
    v_ring, v_full, v_empty = values
    QUERIES: gl.constexpr = q_ring.shape[1]
    HALF: gl.constexpr = QUERIES // 2
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    count = 0
    num_tails = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        tile, head = _tile_of(item, tiles, NUM_HEADS)
        row, limit, num_keys = gl.load(tile), gl.load(tile + 2), gl.load(tile + 3)
        key_row, seq = gl.load(tile + 4), gl.load(tile + 5)
        turn = item // gl.num_programs(0)
        slot = turn % 2
        q_bar, q = q_full.index(slot), q_ring.index(slot)
        mbarrier.wait(q_empty.index(slot), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_bar, QUERIES * HEAD_DIM * 2)
        column = head * HEAD_DIM
        async_load(query, [row, column], q_bar, q.slice(0, HALF))
        async_load(query, [row + HALF, column], q_bar, q.slice(HALF, HALF))
        column = head // GROUP * HEAD_DIM
        for first in range(0, gl.minimum(limit + QUERIES, num_keys), KEYS):
            if BLOCK_SIZE > 0:
                block = gl.load(block_tables + seq * table_stride + first // BLOCK_SIZE)
                place = [block * BLOCK_SIZE + first % BLOCK_SIZE, column]
            else:
                place = [key_row + first, column]
            stage = count % STAGES
            phase = (count // STAGES & 1) ^ 1
            k_bar, v_bar, v = k_full.index(stage), v_full.index(stage), v_ring.index(stage)
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_bar, KEYS * HEAD_DIM * 2)
            async_load(key, place, k_bar, k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            if first + KEYS <= num_keys:
                mbarrier.expect(v_bar, KEYS * HEAD_DIM * 2)
                async_load(value, place, v_bar, v)
            else:  # what follows is not this sequence's: even NaN must do no harm, though 0 * NaN
                mbarrier.expect(tail, KEYS * HEAD_DIM * 2)
                async_load(value, place, tail, v)
                mbarrier.wait(tail, num_tails & 1)
                num_tails += 1
                _zero_rows(v, num_keys - first)
                mbarrier.arrive(v_bar)
            count += 1


@gluon.jit
def _attend(
    out, tiles, num_items, scale, queries, keys, values, PART: gl.constexpr, NUM_HEADS: gl.constexpr
):  # fmt: skip
    """A consumer: a warp group for the first or second half of every tile's queries."""
    q_ring, q_full, q_empty = queries
    k_ring, k_full, k_empty = keys
    v_ring, v_full, v_empty = values
    QUERIES: gl.constexpr = q_ring.shape[1]
    ROWS: gl.constexpr = QUERIES // 2
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    dtype: gl.constexpr = k_ring.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    score_rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score_layout))
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_layout)).expand_dims(0)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, score_layout)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout)).expand_dims(0)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        tile, head = _tile_of(item, tiles, NUM_HEADS)
        row, num_rows = gl.load(tile), gl.load(tile + 1)
        limit, num_keys = gl.load(tile + 2), gl.load(tile + 3)
        # Row r of the tile attends to keys up to limit + r.
        limits = (limit + score_rows).expand_dims(1)
        turn = item // gl.num_programs(0)
        slot = turn % 2
        q = q_ring.index(slot).slice(PART * ROWS, ROWS)
        mbarrier.wait(q_full.index(slot), turn // 2 & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), count // STAGES & 1)
        scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(stage))
        if limit + PART * ROWS < KEYS:
            scores = gl.where(columns <= limits, scores, float("-inf"))
        peak = gl.max(scores, axis=1) * scale
        p = gl.exp2(scores * scale - peak.expand_dims(1))
        total = gl.sum(p, axis=1)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout)
        count += 1
        for first in range(KEYS, gl.minimum(limit + QUERIES, num_keys), KEYS):
            # The scores of these keys, and beside them the product with the values before.
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), count // STAGES & 1)
            k = k_ring.index(stage).permute((1, 0))
            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
            weights = gl.convert_layout(p.to(dtype), weight_layout)
            acc = warpgroup_mma(weights, v_ring.index(last), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(stage))
            if limit + PART * ROWS < first + KEYS:
                scores = gl.where(first + columns <= limits, scores, float("-inf"))
            new_peak = gl.maximum(peak, gl.max(scores, axis=1) * scale)
            p = gl.exp2(scores * scale - new_peak.expand_dims(1))
            rescale = gl.exp2(peak - new_peak)
            total = total * rescale + gl.sum(p, axis=1)
            peak = new_peak
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_empty.index(last))
            acc = acc * gl.convert_layout(rescale.expand_dims(1), layout)
            count += 1
        mbarrier.arrive(q_empty.index(slot))
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
        weights = gl.convert_layout(p.to(dtype), weight_layout)
        acc = warpgroup_mma(weights, v_ring.index(last), acc)
        mbarrier.arrive(v_empty.index(last))
        acc = acc * gl.convert_layout((1.0 / total).expand_dims(1), layout)
        places = (row + rows).to(gl.int64) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        places = places.expand_dims(1) + dims
        gl.store(out + places, acc.to(dtype), mask=(rows < num_rows).expand_dims(1))


@gluon.jit(do_not_specialize=["num_items", "table_stride"])
def _hopper_prefill_kernel(
    query, key, value, out, tiles, block_tables, num_items, table_stride, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """`query`, `key`, `value` are descriptors. BLOCK_SIZE 0: keys lie as the queries do."""
    dtype: gl.constexpr = query.dtype
    ROWS: gl.constexpr = query.block_shape[0]
    KEYS: gl.constexpr = key.block_shape[0]
    HEAD_DIM: gl.constexpr = key.block_shape[1]
    q_ring = gl.allocate_shared_memory(dtype, [2, 2 * ROWS, HEAD_DIM], query.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], key.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], value.layout)
    queries = q_ring, new_barriers(2, 1), new_barriers(2, 2)
    keys = k_ring, new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    values = v_ring, new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    tail = new_barriers(1, 1).index(0)
    fence_async_shared()
    if PDL:  # the other warps start only after this
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_attend, (out, tiles, num_items, scale, queries, keys, values, 0, NUM_HEADS)),
            (_attend, (out, tiles, num_items, scale, queries, keys, values, 1, NUM_HEADS)),
            (_load_tiles, (
                query, key, value, tiles, block_tables, num_items, table_stride, queries, keys,
                values, tail, NUM_HEADS, GROUP, BLOCK_SIZE,
            )),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def is_faster(query: Tensor, query_lens: list[int], block_size: int) -> bool:
    """True for steps in which this was measured to be faster than kernels.attention.

    Those of many tokens, in sequences long enough to fill most of their tiles.

    Args:
        query: [num_tokens, num_heads, head_dim].
        query_lens: the tokens of each sequence, num_tokens together.
        block_size: of the cache that keys come from; 0: they come from this step.
    """
    num_tokens, _, head_dim = query.shape
    fits = head_dim == SUPPORTED_HEAD_DIM and block_size % KEY_TILE == 0
    fits = fits and query.element_size() == 2 and is_hopper(query.device)
    mean_len = num_tokens / len(query_lens)
    return fits and num_tokens >= MIN_TOKENS and mean_len >= MIN_TILES_A_SEQUENCE * QUERY_TILE


def hopper_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tiles: Tensor,
    scale: float,
    block_tables: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of sequences that lie in a row. Twin: layers.torch_attention.torch_prefill.

    Query i of a sequence with q queries and k keys attends to keys 0 .. k - q + i.

    Args:
        query: [num_tokens, num_heads, 128] bf16 or fp16, contiguous.
        key, value: [num_keys, num_kv_heads, 128], rows contiguous; or, with block_tables, the
            caches [num_blocks, block_size, num_kv_heads, 128], block_size a multiple of 128.
        query_tiles: int32 [num_tiles, 6], from utils.context.cut_queries.
        block_tables: int32 [num_seqs, max_blocks].

    Returns:
        [num_tokens, num_heads, 128] in query's dtype: `out`, if given.
    """
    num_heads, num_kv_heads = query.size(1), key.size(-2)
    block_size = key.size(1) if block_tables is not None else 0
    assert query.is_contiguous() and query.size(2) == SUPPORTED_HEAD_DIM
    assert block_size % KEY_TILE == 0
    assert query_tiles.is_contiguous() and num_heads % num_kv_heads == 0
    if block_tables is not None:
        assert key.is_contiguous() and value.is_contiguous() and block_tables.stride(1) == 1
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    assert all(x.stride()[1:] == (SUPPORTED_HEAD_DIM, 1) for x in (key, value))
    out = torch.empty_like(query) if out is None else out
    assert out.is_contiguous()
    num_items = len(query_tiles) * num_heads
    launch(
        _hopper_prefill_kernel, (min(num_items, num_sms(query.device)),), query,
        descriptor(query.flatten(1), QUERY_TILE // 2, SUPPORTED_HEAD_DIM),
        descriptor(key.flatten(1), KEY_TILE, SUPPORTED_HEAD_DIM),
        descriptor(value.flatten(1), KEY_TILE, SUPPORTED_HEAD_DIM),
        out, query_tiles, block_tables, num_items,
        block_tables.stride(0) if block_tables is not None else 0, scale * LOG2_E,
        NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, STAGES=NUM_STAGES,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )  # fmt: skip
    return out
