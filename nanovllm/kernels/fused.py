"""Elementwise work of a layer: norm; QK-norm + rotary + store; SiLU * up.

Twins: nanovllm.layers.layernorm, .rotary_embedding, .activation. The kernels round where the twins
do (after the norm, after its weight), so both give the same tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.kv_quantization import magnitudes, round_to_e4m3, scale_exponents
from nanovllm.kernels.launch import launch


@triton.jit
def last_first() -> tl.tensor:
    """The place of this program in a grid of one dimension, counted from the end.

    What the kernel before wrote last is still in L2: it is read first, and what follows begins with
    what is written last here.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program a row."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    w = tl.load(weight + offsets, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = last_first().to(tl.int64) * SIZE + offsets
    v = tl.load(x + row, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / SIZE + eps)
    rounded = (v * scale).to(w.dtype).to(tl.float32)
    tl.store(out + row, rounded * w.to(tl.float32), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Twin: nanovllm.layers.layernorm.rms_norm.

    Args:
        x: [num_tokens, size], contiguous.
        weight: [size], in x's dtype.
    """
    num_tokens, size = x.shape
    assert x.is_contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    launch(
        _rms_norm_kernel, (num_tokens,), x, x, weight, out, eps, SIZE=size, BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return out


@triton.jit
def _norm_halves(x, y, weight, eps, halves, mask, HEAD_DIM: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm of heads whose halves are x and y, float32 [heads, len(halves)]."""
    w_x = tl.load(weight + halves, mask=mask, other=0.0).to(tl.float32)[None, :]
    w_y = tl.load(weight + HEAD_DIM // 2 + halves, mask=mask, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / HEAD_DIM + eps)[:, None]
    x = ((x * scale).to(dtype).to(tl.float32) * w_x).to(dtype).to(tl.float32)
    y = ((y * scale).to(dtype).to(tl.float32) * w_y).to(dtype).to(tl.float32)
    return x, y


@triton.jit
def _store_halves(pointers, x, y, mask, HEAD_DIM: tl.constexpr) -> None:
    tl.store(pointers, x, mask=mask)
    tl.store(pointers + HEAD_DIM // 2, y, mask=mask)


@triton.jit
def _store_rows(
    cache, scales, slot, first, rows, x, y, mask, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store heads from `first` on, unless slot is -1; gives back what the cache holds of them.

    x, y: their halves, whose elements lie from `rows` on.
    """
    stored_x, stored_y = x, y
    if scales is not None:
        peaks = tl.maximum(tl.max(magnitudes(x), axis=1), tl.max(magnitudes(y), axis=1))
        exponents = scale_exponents(peaks)
        dtype: tl.constexpr = x.dtype
        stored_x, x = round_to_e4m3(x, exponents[:, None])
        stored_y, y = round_to_e4m3(y, exponents[:, None])
        x, y = x.to(dtype), y.to(dtype)
        if slot >= 0:
            heads = first + tl.arange(0, rows.shape[0])
            tl.store(scales + slot * NUM_KV_HEADS + heads, exponents.to(tl.uint8))
    if slot >= 0:
        pointers = cache + slot * (NUM_KV_HEADS * HEAD_DIM) + rows
        _store_halves(pointers, stored_x, stored_y, mask, HEAD_DIM)
    return x, y


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, q_out, k_out, k_cache, v_cache,
    k_scales, v_scales, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, STORE: tl.constexpr,
    WRITE_KEY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for HEADS heads of a token; HEADS divides both head counts.

    A head is handled as two halves, which are rotated with each other.
    """
    GROUPS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) // HEADS
    place = last_first()
    token = (place // GROUPS).to(tl.int64)
    first = place % GROUPS * HEADS
    halves = tl.arange(0, BLOCK_H)
    in_half = halves < HEAD_DIM // 2
    angles = cos_sin + tl.load(positions + token) * HEAD_DIM + halves
    cos = tl.load(angles, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angles + HEAD_DIM // 2, mask=in_half, other=0.0)[None, :]
    if STORE:
        slot = tl.load(slot_mapping + token).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = qkv.dtype.element_ty
    mask = in_half[None, :]
    rows = (first + tl.arange(0, HEADS))[:, None] * HEAD_DIM + halves[None, :]
    heads = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + rows
    x = tl.load(heads, mask=mask, other=0.0)
    y = tl.load(heads + HEAD_DIM // 2, mask=mask, other=0.0)
    if first < NUM_HEADS + NUM_KV_HEADS:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        if NORM:
            weight = q_weight if first < NUM_HEADS else k_weight
            x, y = _norm_halves(x, y, weight, eps, halves, in_half, HEAD_DIM, dtype)
        x, y = (x * cos - y * sin).to(dtype), (y * cos + x * sin).to(dtype)
        if first < NUM_HEADS:
            _store_halves(q_out + token * (NUM_HEADS * HEAD_DIM) + rows, x, y, mask, HEAD_DIM)
        else:
            first -= NUM_HEADS
            rows -= NUM_HEADS * HEAD_DIM
            if STORE:
                x, y = _store_rows(
                    k_cache, k_scales, slot, first, rows, x, y, mask, NUM_KV_HEADS, HEAD_DIM
                )
            if WRITE_KEY:
                pointers = k_out + token * (NUM_KV_HEADS * HEAD_DIM) + rows
                _store_halves(pointers, x, y, mask, HEAD_DIM)
    elif STORE:
        first -= NUM_HEADS + NUM_KV_HEADS
        rows -= (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
        x, y = _store_rows(v_cache, v_scales, slot, first, rows, x, y, mask, NUM_KV_HEADS, HEAD_DIM)
        if WRITE_KEY and v_scales is not None:
            _store_halves(heads, x, y, mask, HEAD_DIM)


def rope_config(num_tokens: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Heads a program, warps. Few tokens: small programs, so that many SMs share the work."""
    heads = 8 if num_tokens >= 64 else 2
    while num_heads % heads or num_kv_heads % heads:
        heads //= 2
    return heads, 2 if heads >= 4 else 1


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    write_key: bool = True,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """QK-norm, rotary embedding and the store of K and V, from the merged projection.

    Twins: rms_norm, apply_rotary and store_kvcache of nanovllm.layers, one after the other.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous.
        q_weight, k_weight: [head_dim] in qkv's dtype, or None: no norm.
        cos_sin: float32 [max_positions, head_dim], cos | sin.
        positions: int64 [num_tokens].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; None or
            empty: nothing is stored.
        slot_mapping: int32 [num_tokens], -1 = nowhere.
        write_key: also return K, for a prefill that attends to this step's keys.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].

    Returns:
        q [num_tokens, num_heads, head_dim]; k [num_tokens, num_kv_heads, head_dim] or None;
        v as k, a view of qkv. With an FP8 cache k and v are rounded as it rounds them; without
        write_key v is not.
    """
    num_tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    assert qkv.is_contiguous() and cos_sin.is_contiguous() and cos_sin.size(1) == head_dim
    assert head_dim % 2 == 0 and (q_weight is None) == (k_weight is None)
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    k = qkv.new_empty(num_tokens, num_kv_heads, head_dim) if write_key else None
    v = qkv.view(num_tokens, -1, head_dim)[:, num_heads + num_kv_heads :]
    store = k_cache is not None and k_cache.numel() > 0
    heads, num_warps = rope_config(num_tokens, num_heads, num_kv_heads)
    launch(
        _qk_norm_rope_store_kernel, (num_tokens * (num_heads + 2 * num_kv_heads) // heads,), qkv,
        qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, q, k, k_cache, v_cache,
        k_scales, v_scales, eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(head_dim // 2), HEADS=heads, NORM=q_weight is not None,
        STORE=store, WRITE_KEY=write_key, num_warps=num_warps,
    )  # fmt: skip
    return q, k, v


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr) -> tl.tensor:
    """silu(gate) * up with the twin's rounding between the two, in float32."""
    gate = gate.to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (activated * up.to(tl.float32)).to(dtype)


@triton.jit
def _silu_and_mul_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program for BLOCK columns of a row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    PARTS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    place = last_first()
    token = (place // PARTS).to(tl.int64)
    columns = place % PARTS * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + columns, mask=mask)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + columns, mask=mask)
    tl.store(out + token * SIZE + columns, silu_times(gate, up, gate.dtype), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up. Twin: nanovllm.layers.activation.silu_and_mul.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], contiguous.

    Returns:
        [num_tokens, intermediate_size].
    """
    num_tokens, width = gate_up.shape
    size = width // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(num_tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    grid = (num_tokens * triton.cdiv(size, block),)
    launch(_silu_and_mul_kernel, grid, gate_up, gate_up, out, SIZE=size, BLOCK=block)
    return out
