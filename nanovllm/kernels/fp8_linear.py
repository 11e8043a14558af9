"""Linear layers of FP8 tokens and weights.

The weight's values are the first operand of a tensor core's products, tokens the second, so that
few tokens fill one. Of each 128 inputs the sum is scaled and added to float32 sums: a tensor core
itself adds up FP8 products less exactly. Twins: quantize_rows of nanovllm.layers.fp8, and F.linear
of what it gives and the weight, both dequantised.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.device import prefetch, shared_memory
from nanovllm.kernels.fused import last_first, silu_times
from nanovllm.kernels.launch import launch
from nanovllm.kernels.small_linear import store_outputs
from nanovllm.utils.quantization import BLOCK, E4M3_MAX, Fp8Rows, Fp8Weight


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


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _fp8_linear_kernel(
    x, x_scales, weight, lines, scales, bias, residual, out, partial, counters, num_tokens,
    num_rows, N: tl.constexpr, K: tl.constexpr, SCALED_ROWS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for one of PARTS parts of the inputs, BLOCK_N outputs and BLOCK_M tokens.

    As _small_linear_kernel of kernels.small_linear, but that tiles are [outputs, tokens]. x and
    weight are descriptors; `lines` is the weight's memory, of which AHEAD groups of inputs are
    asked for before the tokens are waited for. A scale is for SCALED_ROWS rows, which BLOCK_N
    divides, and GROUP inputs.
    """
    NUM: tl.constexpr = K // GROUP
    PART: tl.constexpr = (NUM + PARTS - 1) // PARTS
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    first_token = tl.program_id(0) % tiles_m * BLOCK_M
    first_row = tl.program_id(0) // tiles_m * BLOCK_N
    tokens = first_token + tl.arange(0, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * PART
    own_scales = scales + first_row // SCALED_ROWS * NUM
    if PDL:
        groups = start + tl.arange(0, AHEAD)
        lines += rows.to(tl.int64)[:, None] * K + tl.minimum(groups, NUM - 1)[None, :] * GROUP
        prefetch(lines)
        if GATED:
            prefetch(lines + N * K)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in tl.range(start, tl.minimum(start + PART, NUM), num_stages=STAGES):
        v = x.load([first_token, group * GROUP]).T
        own = x_scales + group * num_rows + tokens
        token_scales = tl.load(own, mask=tokens < num_tokens, other=0.0)[None, :]
        w = weight.load([first_row, group * GROUP])
        acc += tl.dot(w, v) * (tl.load(own_scales + group) * token_scales)
        if GATED:
            w = weight.load([N + first_row, group * GROUP])
            factor = tl.load(own_scales + N // SCALED_ROWS * NUM + group)
            up += tl.dot(w, v) * (factor * token_scales)
    places = tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = (tokens < num_tokens)[None, :] & (rows < N)[:, None]
    if PARTS > 1:
        size = num_tokens * N
        tl.store(partial + tl.program_id(1) * size + places, acc, mask=mask)
        tl.debug_barrier()  # all threads have written before one of them counts
        counter = counters + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(counter, 0)  # for the next launch
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(PARTS):
                # .cg: from L2, where the other programs' writes are.
                pointers = partial + part * size + places
                acc += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
            store_outputs(out, places, acc, up, bias, residual, rows[:, None], mask, N, GATED)
    else:
        store_outputs(out, places, acc, up, bias, residual, rows[:, None], mask, N, GATED)


class Fp8LinearPlan(NamedTuple):
    """Tokens and outputs of a tile; tiles in flight; parts of the inputs; groups read ahead."""

    tokens: int
    outputs: int
    num_stages: int
    num_parts: int
    ahead: int


def fp8_linear_plan(
    num_tokens: int, input_size: int, output_size: int, gated: bool, shared_bytes: int
) -> Fp8LinearPlan:
    """A plan that fits so much shared memory. Measured on an H100."""
    tokens = min(128, max(16, triton.next_power_of_2(num_tokens)))
    outputs = 64
    num_tiles = triton.cdiv(output_size, outputs) * triton.cdiv(num_tokens, tokens)
    num_parts = 1
    while not gated and num_parts < 4 and num_tiles * num_parts < 150:
        num_parts *= 2
    num_parts = max(1, min(num_parts, input_size // 512))
    tile_bytes = BLOCK * (tokens + outputs * (2 if gated else 1))
    most = 6 if tokens <= 64 and not gated else 4
    num_stages = max(2, min(most, shared_bytes // 2 // tile_bytes))
    return Fp8LinearPlan(tokens, outputs, num_stages, num_parts, 4)


def fp8_linear(
    rows: Fp8Rows,
    weight: Fp8Weight,
    bias: Tensor | None,
    counters: Tensor,
    residual: Tensor | None,
    gated: bool,
    out: Tensor | None,
) -> Tensor:
    """A linear layer of FP8 tokens and weights. Twin: F.linear of both dequantised.

    Args:
        rows: of input_size numbers, from quantize_rows.
        weight: [output_size, input_size] in blocks of 128 inputs, and of 64 or 128 rows; gated:
            twice as many rows, gate over up.
        bias: [output_size]; not with gated.
        counters: from kernels.small_linear.small_linear_counters.
        residual: [num_tokens, output_size], contiguous, to be added to the rounded output.

    Returns:
        [num_tokens, output_size]: `out`, if given, which must be contiguous.
    """
    x, num_tokens, input_size = rows.values, len(rows), rows.values.size(1)
    output_size = weight.shape[0] // (2 if gated else 1)
    scaled_rows, scaled_inputs = weight.block
    assert x.is_contiguous() and weight.values.is_contiguous() and weight.scales.is_contiguous()
    assert scaled_inputs == BLOCK and rows.scales.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = x.new_empty(num_tokens, output_size, dtype=rows.dtype) if out is None else out
    assert out.is_contiguous() and out.shape == (num_tokens, output_size)
    shared_bytes = shared_memory(x.device)
    plan = fp8_linear_plan(num_tokens, input_size, output_size, gated, shared_bytes)
    assert scaled_rows % plan.outputs == 0 and output_size % scaled_rows == 0
    num_tiles = triton.cdiv(output_size, plan.outputs) * triton.cdiv(num_tokens, plan.tokens)
    partial = None
    if plan.num_parts > 1:
        partial = x.new_empty(plan.num_parts, num_tokens, output_size, dtype=torch.float32)
        assert len(counters) >= num_tiles
    launch(
        _fp8_linear_kernel, (num_tiles, plan.num_parts), x,
        TensorDescriptor.from_tensor(x, [plan.tokens, BLOCK]), rows.scales,
        TensorDescriptor.from_tensor(weight.values, [plan.outputs, BLOCK]), weight.values,
        weight.scales, bias, residual, out, partial, counters, num_tokens, len(x), N=output_size,
        K=input_size, SCALED_ROWS=scaled_rows, GROUP=BLOCK, PARTS=plan.num_parts,
        BLOCK_M=plan.tokens, BLOCK_N=plan.outputs, STAGES=plan.num_stages, AHEAD=plan.ahead,
        GATED=gated,
    )  # fmt: skip
    return out
