"""Causal attention. Twin: nanovllm.layers.torch_attention."""

import torch
from torch import Tensor

from nanovllm.kernels.cpu.build import DTYPES, call, layout

PANEL = 64  # keys, and columns of values, that scratch memory is taken for at a time


DECODE = layout(
    pointer="query k_cache v_cache k_scales v_scales block_tables lens out",
    long="query_stride table_stride",
    real="scale",
    integer="num_seqs num_kv_heads num_sharing head_dim block_size dtype cache_dtype",
)


def paged_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence. Twin: nanovllm.layers.torch_attention.torch_decode.

    Args:
        query: [num_seqs, num_heads, head_dim], a sequence's heads side by side.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; of an FP8
            cache uint8.
        block_tables: int32 [num_seqs, max_blocks].
        context_lens: int32 [num_seqs], 0: the output is 0.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].

    Returns:
        [num_seqs, num_heads, head_dim], contiguous.
    """
    caches = k_cache, v_cache, k_scales, v_scales
    assert all(x.is_contiguous() for x in caches if x is not None)
    assert query.stride(2) == 1 and query.stride(1) == query.size(2)
    assert block_tables.stride(1) == 1 and context_lens.is_contiguous()
    assert block_tables.dtype == context_lens.dtype == torch.int32
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = query.new_empty(query.shape)
    call(
        *("paged_decode", DECODE, query, *caches, block_tables, context_lens, out),
        *(query.stride(0), block_tables.stride(0), scale),
        *(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size),
        *(DTYPES[query.dtype], DTYPES[k_cache.dtype]),
    )
    return out


PREFILL = layout(
    pointer="query keys values k_scales v_scales block_table out key_panels value_panels",
    long="query_stride key_stride",
    real="scale",
    integer="num_queries num_keys num_kv_heads num_sharing head_dim block_size dtype cache_dtype",
)


def paged_prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_keys: int,
    scale: float,
    out: Tensor,
    block_table: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Causal attention of a sequence's last tokens. Twin: that of torch_attention.torch_prefill.

    Args:
        query: [num_queries, num_heads, head_dim], a token's heads side by side.
        keys, values: [num_keys, num_kv_heads, head_dim], likewise and of one stride; with
            block_table a cache, [num_blocks, block_size, num_kv_heads, head_dim], contiguous, and
            uint8 if it is FP8.
        out: [num_queries, num_heads, head_dim], contiguous, is filled.
        block_table: int32 [at least as many blocks as num_keys take].
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.size(-2)
    key_stride, block_size = keys.stride(0), 0
    if block_table is not None:
        assert keys.is_contiguous() and values.is_contiguous()
        assert block_table.stride(0) == 1 and block_table.dtype == torch.int32
        key_stride, block_size = num_kv_heads * head_dim, keys.size(1)
    for x in (query, keys, values):
        assert x.stride(-1) == 1 and x.stride(-2) == head_dim
    assert out.is_contiguous() and keys.stride(0) == values.stride(0)
    num_padded = -(-num_keys // PANEL) * PANEL, -(-head_dim // PANEL) * PANEL
    panels = torch.empty(2, num_kv_heads, *num_padded, dtype=torch.float32, device=out.device)
    call(
        *("paged_prefill", PREFILL, query, keys, values, k_scales, v_scales, block_table, out),
        *(*panels, query.stride(0), key_stride, scale),
        *(num_queries, num_keys, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size),
        *(DTYPES[query.dtype], DTYPES[keys.dtype]),
    )
