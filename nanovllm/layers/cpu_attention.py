"""Attention on a CPU: prefill in PyTorch, decode by a kernel in C, which copies no keys."""

from torch import Tensor

from nanovllm.layers.torch_attention import AttentionInputs, torch_prefill

cpu_prefill = torch_prefill


def cpu_decode(inputs: AttentionInputs) -> Tensor:
    """Decode with the kernel of nanovllm.kernels.cpu."""
    from nanovllm.kernels.cpu import paged_decode

    query, _, _, k_cache, v_cache, scale, context, k_scales, v_scales = inputs
    tables, lens = context.block_tables, context.context_lens
    assert tables is not None and lens is not None
    return paged_decode(query, k_cache, v_cache, tables, lens, scale, k_scales, v_scales)
