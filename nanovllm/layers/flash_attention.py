"""Attention by the package flash-attn (https://github.com/Dao-AILab/flash-attention), CUDA only."""

from torch import Tensor

from nanovllm.layers.torch_attention import AttentionInputs


def flash_prefill(inputs: AttentionInputs) -> Tensor:
    """Prefill with flash_attn_varlen_func."""
    from flash_attn import flash_attn_varlen_func

    context = inputs.context
    from_cache = context.block_tables is not None
    out: Tensor = flash_attn_varlen_func(
        inputs.query,
        inputs.k_cache if from_cache else inputs.key,
        inputs.v_cache if from_cache else inputs.value,
        cu_seqlens_q=context.cu_seqlens_q,
        cu_seqlens_k=context.cu_seqlens_k,
        # With 1 it would split the keys as a decode does: see flash_decode.
        max_seqlen_q=max(context.max_query_len, 2),
        max_seqlen_k=context.max_key_len,
        softmax_scale=inputs.scale,
        causal=True,
        block_table=context.block_tables,
    )
    return out


def flash_decode(inputs: AttentionInputs) -> Tensor:
    """Decode with flash_attn_with_kvcache, which splits the keys where that makes it faster.

    Not for head_dim 32: flash-attn 2.8.3 combines the parts wrongly there (measured on an H100).
    """
    from flash_attn import flash_attn_with_kvcache

    head_dim = inputs.query.size(-1)
    out: Tensor = flash_attn_with_kvcache(
        inputs.query.unsqueeze(1),
        inputs.k_cache,
        inputs.v_cache,
        cache_seqlens=inputs.context.context_lens,
        block_table=inputs.context.block_tables,
        softmax_scale=inputs.scale,
        causal=True,
        num_splits=1 if head_dim < 64 else 0,
    )
    return out.squeeze(1)
