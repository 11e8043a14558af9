"""Store a step's K and V in the paged cache. Twin: nanovllm.layers.attention.store_kvcache.

The store by itself: the kernel to read first, and the one for a layer whose keys come ready to be
stored. No step of the models here launches it, since wherever Triton is, norm, rotation and store
are one launch (qk_norm_rope_store in nanovllm.kernels.fused), whichever back end attends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_kvcache_kernel(
    key, value, k_cache, v_cache, slot_mapping, key_stride, value_stride, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token: copy its K and V rows of SIZE elements to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)  # slot * SIZE passes 2^31 in a large pool
    if slot >= 0:
        offsets = tl.arange(0, BLOCK)
        mask = offsets < SIZE
        k = tl.load(key + token * key_stride + offsets, mask=mask)
        tl.store(k_cache + slot * SIZE + offsets, k, mask=mask)
        v = tl.load(value + token * value_stride + offsets, mask=mask)
        tl.store(v_cache + slot * SIZE + offsets, v, mask=mask)


def store_kvcache(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write each token's K and V to its slot.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim]; each token's heads contiguous.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        slot_mapping: int32 [num_tokens], block * block_size + offset; -1 = nowhere.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    size = num_kv_heads * head_dim
    assert key.stride()[1:] == (head_dim, 1) and value.stride()[1:] == (head_dim, 1)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    if num_tokens:
        with torch.cuda.device_of(key):
            _store_kvcache_kernel[(num_tokens,)](
                key, value, k_cache, v_cache, slot_mapping, key.stride(0), value.stride(0),
                SIZE=size, BLOCK=triton.next_power_of_2(size),
            )  # fmt: skip
