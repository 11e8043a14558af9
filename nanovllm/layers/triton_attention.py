"""Attention by the library's own kernels, CUDA only."""

from typing import Any

from torch import Tensor

from nanovllm.layers.fp8_prefill import prefill_from_fp8
from nanovllm.layers.torch_attention import AttentionInputs
from nanovllm.model_config import ModelConfig


def triton_prefill(inputs: AttentionInputs, out: Tensor | None = None) -> Tensor:
    """Prefill with the kernel of nanovllm.kernels.hopper_attention or of .attention."""
    from nanovllm.kernels import hopper_attention
    from nanovllm.kernels.attention import paged_prefill

    query, key, value, k_cache, v_cache, scale, context, k_scales, _ = inputs
    tables, block_size = context.block_tables, 0
    if tables is not None:
        if k_scales is not None:
            return prefill_from_fp8(inputs, triton_prefill)
        key, value, block_size = k_cache, v_cache, context.block_size
    assert key is not None
    if hopper_attention.is_faster(query, context.query_lens, block_size):
        tiles = context.query_tiles
        return hopper_attention.hopper_prefill(query, key, value, tiles, scale, tables, out)
    cu_seqlens_q, cu_seqlens_k = context.cu_seqlens_q, context.cu_seqlens_k
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    lengths = cu_seqlens_q, cu_seqlens_k, context.max_query_len
    return paged_prefill(query, key, value, *lengths, scale, tables, out=out)


def triton_prefill_sizes(max_model_len: int) -> set[int]:
    """For Backend.prefill_sizes."""
    from nanovllm.kernels.attention import LONG_QUERIES
    from nanovllm.kernels.hopper_attention import MIN_TOKENS

    longest = min(MIN_TOKENS, max_model_len)
    return {LONG_QUERIES + 1, -(-MIN_TOKENS // longest) * longest}


def triton_workspace(
    config: ModelConfig, max_num_seqs: int, max_model_len: int, options: dict[str, Any]
) -> Any:
    """For Backend.workspace."""
    from nanovllm.kernels.attention import decode_workspace

    sizes = config.num_heads, config.num_kv_heads, config.head_dim
    return decode_workspace(max_num_seqs, *sizes, options["device"])


def triton_decode(inputs: AttentionInputs) -> Tensor:
    """Decode with the kernel of nanovllm.kernels.attention."""
    from nanovllm.kernels.attention import paged_decode

    query, _, _, k_cache, v_cache, scale, context, k_scales, v_scales = inputs
    tables, lens = context.block_tables, context.context_lens
    assert tables is not None and lens is not None
    caches, workspace = (k_cache, v_cache, tables, lens), context.decode_workspace
    return paged_decode(
        query, *caches, scale, workspace=workspace, k_scales=k_scales, v_scales=v_scales
    )
