"""Store a step's K and V in the paged cache. Twin: nanovllm.layers.attention.store_kvcache.

The store by itself: the kernel to read first, and the one for a layer whose keys come ready to be
stored. No step of the models here launches it, since wherever Triton is, norm, rotation and store
are one launch (qk_norm_rope_store in nanovllm.kernels.fused), whichever back end attends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.kv_quantization import magnitudes, round_to_e4m3, scale_exponents


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


@triton.jit
def _quantize_kernel(
    rows, values, exponents, stride, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a head of a token: its bytes and its scale; the row becomes what they hold."""
    head = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < HEAD_DIM
    pointers = rows + head // NUM_HEADS * stride + head % NUM_HEADS * HEAD_DIM + offsets
    row = tl.load(pointers, mask=mask, other=0.0)
    exponent = scale_exponents(tl.max(magnitudes(row), axis=0))
    stored, rounded = round_to_e4m3(row, exponent)
    tl.store(values + head * HEAD_DIM + offsets, stored, mask=mask)
    tl.store(exponents + head, exponent.to(tl.uint8))
    tl.store(pointers, rounded, mask=mask)


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Twin: nanovllm.layers.kv_quantization.quantize; `rows` is overwritten with what they hold."""
    num_tokens, num_heads, head_dim = rows.shape
    values = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    exponents = torch.empty(num_tokens, num_heads, dtype=torch.uint8, device=rows.device)
    if num_tokens:
        with torch.cuda.device_of(rows):
            _quantize_kernel[(num_tokens * num_heads,)](
                rows, values, exponents, rows.stride(0), NUM_HEADS=num_heads, HEAD_DIM=head_dim,
                BLOCK=triton.next_power_of_2(head_dim),
            )  # fmt: skip
    return values, exponents


def store_kvcache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write each token's K and V to its slot.

    Of an FP8 cache, `key` and `value` are overwritten with what it can hold of them.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim]; each token's heads contiguous.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        slot_mapping: int32 [num_tokens], block * block_size + offset; -1 = nowhere.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    if k_scales is not None and v_scales is not None:
        (k, k_exponents), (v, v_exponents) = _quantize(key), _quantize(value)
        store_kvcache(k, v, k_cache, v_cache, slot_mapping)
        k_exponents, v_exponents = k_exponents.unsqueeze(-1), v_exponents.unsqueeze(-1)
        k_scales, v_scales = k_scales.unsqueeze(-1), v_scales.unsqueeze(-1)
        store_kvcache(k_exponents, v_exponents, k_scales, v_scales, slot_mapping)
        return
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
