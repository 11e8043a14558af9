"""Attention on a CPU by the library's own kernels, which neither copy keys nor keep scores."""

from torch import Tensor

from nanovllm.layers.torch_attention import AttentionInputs


def cpu_prefill(inputs: AttentionInputs) -> Tensor:
    """Prefill with the kernel of nanovllm.kernels.cpu.attention, sequence by sequence."""
    from nanovllm.kernels.cpu.attention import paged_prefill

    query, key, value, k_cache, v_cache, scale, context, k_scales, v_scales = inputs
    out = query.new_empty(query.shape)
    end = 0
    for index, length in enumerate(context.query_lens):
        rows = slice(end, end := end + length)
        num_keys = context.key_lens[index]
        if context.block_tables is None:
            assert key is not None
            keys = key[rows], value[rows]
            paged_prefill(query[rows], *keys, num_keys, scale, out[rows])
        else:
            cache = context.block_tables[index], k_scales, v_scales
            paged_prefill(query[rows], k_cache, v_cache, num_keys, scale, out[rows], *cache)
    return out


def cpu_decode(inputs: AttentionInputs) -> Tensor:
    """Decode with the kernel of nanovllm.kernels.cpu.attention."""
    from nanovllm.kernels.cpu.attention import paged_decode

    query, _, _, k_cache, v_cache, scale, context, k_scales, v_scales = inputs
    tables, lens = context.block_tables, context.context_lens
    assert tables is not None and lens is not None
    return paged_decode(query, k_cache, v_cache, tables, lens, scale, k_scales, v_scales)
