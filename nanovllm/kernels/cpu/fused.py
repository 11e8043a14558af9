"""Work around the products of a layer: norm; QK-norm, rotary embedding and store.

Twins: nanovllm.layers.layernorm, .attention.
"""

import torch
from torch import Tensor

from nanovllm.kernels.cpu.build import DTYPES, call, layout

NORM = layout(pointer="x weight out", long="num_rows", real="eps", integer="size dtype")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Twin: nanovllm.layers.layernorm.rms_norm.

    Args:
        x: [..., size].
        weight: [size], in x's dtype.
    """
    assert weight.is_contiguous() and weight.dtype == x.dtype
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.size(-1)
    call("rms_norm", NORM, x, weight, out, x.numel() // size, eps, size, DTYPES[x.dtype])
    return out


STORE = layout(
    pointer="qkv q_weight k_weight cos_sin positions k_cache v_cache slots k_scales v_scales",
    long="num_tokens",
    real="eps",
    integer="num_heads num_kv_heads head_dim dtype",
)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    write_key: bool = True,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Twin: nanovllm.layers.attention.qk_norm_rope_store.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], is overwritten with what is
            returned, if it is contiguous.
        cos_sin: float32 [max_positions, head_dim]. positions: int64 [num_tokens].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, or empty;
            of an FP8 cache uint8.
        slot_mapping: int32 [num_tokens].
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    caches = k_cache, v_cache, slot_mapping, k_scales, v_scales
    qkv = qkv.contiguous()
    tensors = cos_sin, positions, *caches
    assert all(x.is_contiguous() for x in tensors if x is not None)
    assert (cos_sin.dtype, positions.dtype) == (torch.float32, torch.int64)
    assert slot_mapping.dtype == torch.int32
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    num_tokens, _, head_dim = heads.shape
    call(
        *("qk_norm_rope_store", STORE, qkv, q_weight, k_weight, cos_sin, positions),
        *(caches if k_cache.numel() else (None,) * 5),
        *(num_tokens, eps, num_heads, num_kv_heads, head_dim, DTYPES[qkv.dtype]),
    )
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
