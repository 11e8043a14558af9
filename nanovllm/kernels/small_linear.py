"""Linear layers for small batches, where reading the weights takes the time. Twin: F.linear."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.device import shared_memory
from nanovllm.kernels.fused import load_tile, silu_times
from nanovllm.kernels.launch import launch

MAX_SMALL_TOKENS = 64  # beyond them cuBLAS is faster
TILE_OUTPUTS, TILE_INPUTS = 32, 128


@triton.jit(do_not_specialize=["num_tokens"])
def _small_linear_kernel(
    x, weight, bias, residual, out, partial, counters, num_tokens, N: tl.constexpr, K: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for one of PARTS parts of the inputs, BLOCK_N outputs and BLOCK_M tokens.

    Of several parts' programs the last adds up what all have written. GATED: output n is
    silu(row n) * row (N + n) of a weight [2 N, K].
    """
    PART: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = K % (PARTS * BLOCK_K) == 0  # known bounds, no masks: faster loops
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * PART
    w_mask = (columns < N)[:, None]
    x_mask = (tokens < num_tokens)[:, None]
    w_rows = weight + columns.to(tl.int64)[:, None] * K
    x_rows = x + tokens[:, None] * K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        k = (start + first + tl.arange(0, BLOCK_K))[None, :]
        if EVEN:
            v = tl.load(x_rows + k, mask=x_mask, other=0.0)
        else:
            v = tl.load(x_rows + k, mask=x_mask & (k < K), other=0.0)
        w = load_tile(w_rows + k, w_mask & (k < K), EVEN and N % BLOCK_N == 0)
        acc = tl.dot(v, w.T, acc, input_precision=PRECISION)
        if GATED:
            w = load_tile(w_rows + N * K + k, w_mask & (k < K), EVEN and N % BLOCK_N == 0)
            up = tl.dot(v, w.T, up, input_precision=PRECISION)
    places = tokens[:, None] * N + columns[None, :]
    mask = x_mask & (columns < N)[None, :]
    if PARTS > 1:
        size = num_tokens * N
        tl.store(partial + tl.program_id(1) * size + places, acc, mask=mask)
        tl.debug_barrier()  # all threads have written before one of them counts
        counter = counters + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(counter, 0)  # for the next launch
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for part in tl.static_range(PARTS):
                # .cg: from L2, where the other programs' writes are.
                pointers = partial + part * size + places
                acc += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
            _store_outputs(out, places, acc, up, bias, residual, columns, mask, N, GATED)
    else:
        _store_outputs(out, places, acc, up, bias, residual, columns, mask, N, GATED)


@triton.jit
def _store_outputs(
    out, places, acc, up, bias, residual, columns, mask, N: tl.constexpr, GATED: tl.constexpr
) -> None:  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = silu_times(acc.to(dtype), up.to(dtype), dtype)
    if residual is not None:
        acc = acc.to(dtype).to(tl.float32)
        acc += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, acc, mask=mask)


class SmallLinearPlan(NamedTuple):
    """Tokens a tile, tiles in flight, and in how many parts the inputs are divided."""

    tokens: int
    num_stages: int
    num_parts: int


def small_linear_plan(
    num_tokens: int, input_size: int, output_size: int, gated: bool, shared_bytes: int
) -> SmallLinearPlan:
    """A plan for 16-bit elements that fits so much shared memory. Measured on an H100.

    The inputs of a layer with few outputs are divided, so that every SM has a program.
    """
    tokens = min(MAX_SMALL_TOKENS, max(16, triton.next_power_of_2(num_tokens)))
    num_parts = 1
    if not gated:
        num_parts = triton.next_power_of_2(triton.cdiv(100, triton.cdiv(output_size, TILE_OUTPUTS)))
        num_parts = max(1, min(4, num_parts, input_size // 512))
    most = 4 if gated or num_parts > 1 else 8
    stage_bytes = 2 * TILE_INPUTS * (tokens + TILE_OUTPUTS * (2 if gated else 1))
    return SmallLinearPlan(tokens, max(1, min(most, shared_bytes // stage_bytes)), num_parts)


def small_linear_counters(output_size: int) -> Tensor:
    """What `small_linear` needs to know when a tile is complete: int32 zeros, one a tile.

    Launches that may overlap in time (other than in one stream) must not share them.
    """
    return torch.zeros(triton.cdiv(output_size, TILE_OUTPUTS), dtype=torch.int32)


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    counters: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """A linear layer of up to MAX_SMALL_TOKENS tokens. Twins: F.linear; gated: silu_and_mul of it.

    Args:
        x: [num_tokens, input_size], contiguous.
        weight: [output_size, input_size], contiguous, in x's dtype; gated: twice as many rows,
            gate over up.
        bias: [output_size]; not with gated.
        counters: from small_linear_counters; None allocates them, which costs a launch.
        residual: [num_tokens, output_size], contiguous, to be added to the rounded output.

    Returns:
        [num_tokens, output_size].
    """
    num_tokens, input_size = x.shape
    output_size = len(weight) // (2 if gated else 1)
    assert num_tokens <= MAX_SMALL_TOKENS and not (gated and bias is not None)
    assert x.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    plan = small_linear_plan(
        num_tokens, input_size, output_size, gated, shared_memory(x.device) * 2 // x.element_size()
    )
    num_tiles = triton.cdiv(output_size, TILE_OUTPUTS)
    partial = None
    if plan.num_parts == 1:
        counters = None
    else:
        partial = x.new_empty(plan.num_parts, num_tokens, output_size, dtype=torch.float32)
        if counters is None:
            counters = x.new_zeros(num_tiles, dtype=torch.int32)
    out = x.new_empty(num_tokens, output_size)
    launch(
        _small_linear_kernel, (num_tiles, plan.num_parts), x,
        x, weight, bias, residual, out, partial, counters, num_tokens, N=output_size, K=input_size,
        PARTS=plan.num_parts, BLOCK_M=plan.tokens, BLOCK_N=TILE_OUTPUTS, BLOCK_K=TILE_INPUTS,
        STAGES=plan.num_stages, GATED=gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out
