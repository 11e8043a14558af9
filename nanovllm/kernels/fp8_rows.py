"""Tokens as FP8, for products with FP8 weights. Twin: nanovllm.layers.fp8.quantize_rows."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.fused import last_first, silu_times
from nanovllm.kernels.launch import launch
from nanovllm.utils.quantization import BLOCK, E4M3_MAX, Fp8Rows


@triton.jit
def _store_quantized(
    v, values, scales, groups, token, num_rows, SIZE: tl.constexpr, GROUP: tl.constexpr,
    MAX: tl.constexpr,
) -> None:  # fmt: skip
    """Float32 [groups, GROUP] of a token, each group with the scale that makes its largest MAX."""
    scale = tl.max(tl.abs(v), axis=1) / MAX
    v = v / tl.where(scale == 0, 1.0, scale)[:, None]
    v = tl.minimum(tl.maximum(v, -MAX), MAX)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    places = values + token.to(tl.int64) * SIZE + offsets
    tl.store(places, v.to(values.dtype.element_ty), mask=offsets < SIZE)
    tl.store(scales + groups * num_rows + token, scale, mask=groups < SIZE // GROUP)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x, norm_weight, values, scales, eps, num_rows, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for a row, its norm first if it has one."""
    groups = tl.arange(0, GROUPS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < SIZE
    if norm_weight is not None:
        gain = tl.load(norm_weight + offsets, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = last_first()
    dtype: tl.constexpr = x.dtype.element_ty
    v = tl.load(x + token.to(tl.int64) * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(tl.sum(v * v, axis=1), axis=0) / SIZE + eps)
        v = (v * scale).to(dtype).to(tl.float32) * gain.to(tl.float32)
        v = v.to(dtype).to(tl.float32)
    _store_quantized(v, values, scales, groups, token, num_rows, SIZE, GROUP, MAX)


def quantize_rows(
    x: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0, step: int = 1
) -> Fp8Rows:
    """rms_norm(x) as FP8. Twin: layers.fp8.quantize_rows.

    Args:
        x: [num_tokens, size], contiguous; 128 divides size.
        norm_weight: [size], or None: no norm.
        step: the rows are rounded up to a multiple of it.
    """
    num_tokens, size = x.shape
    assert x.is_contiguous() and size % BLOCK == 0
    rows = Fp8Rows.empty(num_tokens, size, step, x)
    groups = triton.next_power_of_2(size // BLOCK)
    launch(
        _quantize_rows_kernel, (num_tokens,), x,
        x, norm_weight, rows.values, rows.scales, eps, len(rows.values), SIZE=size, GROUPS=groups,
        GROUP=BLOCK, MAX=E4M3_MAX, num_warps=min(max(groups // 4, 1), 8),
    )  # fmt: skip
    return rows


@triton.jit(do_not_specialize=["num_rows"])
def _silu_and_quantize_kernel(
    gate_up, values, scales, num_rows, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for GROUPS groups of a row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    PARTS: tl.constexpr = (SIZE // GROUP + GROUPS - 1) // GROUPS
    place = last_first()
    token = place // PARTS
    groups = place % PARTS * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = gate_up + token.to(tl.int64) * (2 * SIZE) + offsets
    gate = tl.load(row, mask=offsets < SIZE, other=0.0)
    up = tl.load(row + SIZE, mask=offsets < SIZE, other=0.0)
    v = silu_times(gate, up, gate.dtype).to(tl.float32)
    _store_quantized(v, values, scales, groups, token, num_rows, SIZE, GROUP, MAX)


def silu_and_quantize(gate_up: Tensor, num_tokens: int) -> Fp8Rows:
    """SiLU(gate) * up as FP8. Twins: silu_and_mul, and quantize_rows of layers.fp8.

    Args:
        gate_up: [num_rows, 2 * size], contiguous, of which num_tokens count; 128 divides size.
    """
    num_rows, width = gate_up.shape
    size = width // 2
    assert gate_up.is_contiguous() and size % BLOCK == 0
    rows = Fp8Rows.empty(num_tokens, size, num_rows, gate_up)
    groups = min(16, triton.next_power_of_2(size // BLOCK))
    launch(
        _silu_and_quantize_kernel, (num_tokens * triton.cdiv(size // BLOCK, groups),), gate_up,
        gate_up, rows.values, rows.scales, num_rows, SIZE=size, GROUPS=groups, GROUP=BLOCK,
        MAX=E4M3_MAX, num_warps=4,
    )  # fmt: skip
    return rows
