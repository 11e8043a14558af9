"""A mixture of experts: the router's choice, and the experts' MLPs.

Of few tokens each multiplies with the weights of its own experts alone, so that nothing else is
read (few_tokens_experts). Of many, those of one expert are multiplied together, in tiles of a
grouped product (grouped_experts). Which tokens are whose stays on the GPU: an expert has a bucket
that holds its (token, choice) pairs in any order, and each program finds its tile by the buckets'
counts.

Twins: nanovllm.layers.moe.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.device import has_tma, shared_memory
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.fused import silu_times
from nanovllm.kernels.launch import launch
from nanovllm.kernels.small_linear import add_product
from nanovllm.utils.quantization import BLOCK, Fp8Weight, Stored


class Buckets(NamedTuple):
    """Which (token, choice) pairs each expert has.

    counts: int32 [num_experts]. pairs: int32 [num_experts, num_tokens], token * num_chosen +
    choice, the first `counts` of each row.
    """

    counts: Tensor
    pairs: Tensor


# --- routing


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits, weights, chosen, counts, pairs, num_tokens, EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, RENORMALIZED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for a token."""
    token = tl.program_id(0)
    experts = tl.arange(0, BLOCK)
    places = tl.arange(0, PLACES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mask = experts < EXPERTS
    row = logits + token.to(tl.int64) * EXPERTS
    x = tl.load(row + experts, mask=mask, other=-float("inf")).to(tl.float32)
    exps = tl.exp(x - tl.max(x, axis=0))
    left = tl.where(mask, exps, -1.0)
    left = tl.where(left != left, 0.0, left)  # of NaN any expert will do
    found = tl.zeros([PLACES], tl.float32)
    ids = tl.zeros([PLACES], tl.int32)
    for choice in tl.static_range(CHOSEN):
        best = tl.argmax(left, axis=0)
        is_best = experts == best
        found = tl.where(places == choice, tl.sum(tl.where(is_best, exps, 0.0), axis=0), found)
        ids = tl.where(places == choice, best, ids)
        left = tl.where(is_best, -2.0, left)
    total = tl.sum(exps, axis=0)
    found = found / (tl.sum(found, axis=0) if RENORMALIZED else total) + 0 * total  # NaN stays NaN
    kept = places < CHOSEN
    own = token * CHOSEN + places
    tl.store(weights + own, found, mask=kept)
    tl.store(chosen + own, ids, mask=kept)
    if counts is not None:
        place = tl.atomic_add(counts + ids, 1, mask=kept, sem="relaxed")
        tl.store(pairs + ids.to(tl.int64) * num_tokens + place, own, mask=kept)


def route(
    logits: Tensor, num_chosen: int, renormalized: bool, buckets: Buckets | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest experts of each token, and their weights; of equals the first. Twin: route.

    Args:
        logits: [num_tokens, num_experts], contiguous.
        buckets: to be filled; their counts must be 0.

    Returns:
        float32 and int32 [num_tokens, num_chosen], the weightiest first.
    """
    num_tokens, num_experts = logits.shape
    assert logits.is_contiguous() and num_chosen <= num_experts
    weights = logits.new_empty(num_tokens, num_chosen, dtype=torch.float32)
    chosen = torch.empty_like(weights, dtype=torch.int32)
    counts, pairs = (None, None) if buckets is None else buckets
    launch(
        _route_kernel, (num_tokens,), logits,
        logits, weights, chosen, counts, pairs, num_tokens, EXPERTS=num_experts, CHOSEN=num_chosen,
        BLOCK=triton.next_power_of_2(num_experts), PLACES=triton.next_power_of_2(num_chosen),
        RENORMALIZED=renormalized, num_warps=1 if num_experts <= 256 else 4,
    )  # fmt: skip
    return weights, chosen


# --- few tokens


@triton.jit
def _few_gate_up_kernel(
    x, norm_weight, gate_up, scales, chosen, out, eps, CHOSEN: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    SCALED_ROWS: tl.constexpr, SCALED_INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS outputs of a (token, choice) pair: its norm first, then its expert's.

    x is there before the routing is: only that is waited for. `scales`, if the weights are FP8, has
    one for SCALED_ROWS rows of an expert, which ROWS divides, and SCALED_INPUTS.
    """
    pair = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    dtype: tl.constexpr = x.dtype.element_ty
    row = x + (pair // CHOSEN).to(tl.int64) * K
    inputs = ()
    square = tl.zeros([BLOCK_K], tl.float32)
    for tile in tl.static_range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        v = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        square += v * v
        inputs += (v,)
    scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen + pair).to(tl.int64)
    weight = gate_up + expert * (2 * N * K)
    if scales is not None:
        first_row = expert * 2 * N + tl.program_id(0) * ROWS
        scales += first_row // SCALED_ROWS * (K // SCALED_INPUTS)
    y = tl.zeros([ROWS, BLOCK_K], tl.float32)
    z = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for tile in tl.static_range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        places = rows[:, None] * K + k[None, :]
        mask = row_mask[:, None] & (k < K)[None, :]
        gate = tl.load(weight + places, mask=mask, other=0.0)
        up = tl.load(weight + N * K + places, mask=mask, other=0.0)
        gain = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        v = (inputs[tile] * scale).to(dtype).to(tl.float32) * gain
        v = v.to(dtype).to(tl.float32)
        u = v
        if scales is not None:
            own = scales + k // SCALED_INPUTS
            v *= tl.load(own, mask=k < K, other=0.0)
            own += N // SCALED_ROWS * (K // SCALED_INPUTS)
            u *= tl.load(own, mask=k < K, other=0.0)
        y += gate.to(tl.float32) * v[None, :]
        z += up.to(tl.float32) * u[None, :]
    total = silu_times(tl.sum(y, axis=1).to(dtype), tl.sum(z, axis=1).to(dtype), dtype)
    tl.store(out + pair.to(tl.int64) * N + rows, total, mask=row_mask)


@triton.jit
def _few_down_kernel(
    y, residual, down, scales, weights, chosen, out, CHOSEN: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    SCALED_ROWS: tl.constexpr, SCALED_INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS outputs of a token: all of its experts.

    What was routed was written before the launch that this one waits for: the weights can come.
    """
    token = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    places = rows[:, None] * K
    tiles = ()
    factors = ()
    for choice in tl.static_range(CHOSEN):
        expert = tl.load(chosen + token * CHOSEN + choice).to(tl.int64)
        weight = down + expert * (N * K)
        for tile in tl.static_range(TILES):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (k < K)[None, :]
            tiles += (tl.load(weight + places + k[None, :], mask=mask, other=0.0),)
            if scales is not None:
                first_row = expert * N + tl.program_id(0) * ROWS
                own = scales + first_row // SCALED_ROWS * (K // SCALED_INPUTS)
                factors += (tl.load(own + k // SCALED_INPUTS, mask=k < K, other=0.0),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = y.dtype.element_ty
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(CHOSEN):
        pair = token * CHOSEN + choice
        sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for tile in tl.static_range(TILES):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            v = tl.load(y + pair.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
            if scales is not None:
                v *= factors[choice * TILES + tile]
            sums += tiles[choice * TILES + tile].to(tl.float32) * v[None, :]
        part = tl.sum(sums, axis=1).to(dtype).to(tl.float32)
        total += part * tl.load(weights + pair)
    own = token.to(tl.int64) * N + rows
    total = total.to(dtype).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + own, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + own, total, mask=row_mask)


def few_tokens_experts(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_up: Stored,
    down: Stored,
    weights: Tensor,
    chosen: Tensor,
    residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + run_experts(rms_norm(x)), in two launches. Twins: rms_norm and run_experts.

    Args:
        x: [num_tokens, hidden_size], contiguous.
        norm_weight: [hidden_size].
        gate_up: [num_experts, 2 * intermediate_size, hidden_size], contiguous, gate over up.
        down: [num_experts, hidden_size, intermediate_size], contiguous. Both may be FP8, in blocks
            of a multiple of 64 rows and of 32 inputs or more.
        weights, chosen: from route.
        residual: [num_tokens, hidden_size], contiguous, or None: nothing is added.

    Returns:
        [num_tokens, hidden_size]: `out`, if given, which must be contiguous.
    """
    (num_tokens, hidden_size), num_chosen = x.shape, chosen.size(1)
    size = down.shape[2]
    gate_up, gate_up_scales, gate_up_block = _parts(gate_up)
    down, down_scales, down_block = _parts(down)
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    y = x.new_empty(num_tokens * num_chosen, size)
    out = torch.empty_like(x) if out is None else out
    block = min(2048, triton.next_power_of_2(hidden_size))
    rows = 4 if hidden_size <= 4096 else 2
    launch(
        _few_gate_up_kernel, (triton.cdiv(size, rows), num_tokens * num_chosen), x,
        x, norm_weight, gate_up, gate_up_scales, chosen, y, eps, CHOSEN=num_chosen, N=size,
        K=hidden_size, ROWS=rows, BLOCK_K=block, TILES=triton.cdiv(hidden_size, block),
        SCALED_ROWS=gate_up_block[0], SCALED_INPUTS=gate_up_block[1], num_warps=8,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(size))
    launch(
        _few_down_kernel, (triton.cdiv(hidden_size, 2), num_tokens), x,
        y, residual, down, down_scales, weights, chosen, out, CHOSEN=num_chosen, N=hidden_size,
        K=size, ROWS=2, BLOCK_K=block, TILES=triton.cdiv(size, block), SCALED_ROWS=down_block[0],
        SCALED_INPUTS=down_block[1], num_warps=2,
    )  # fmt: skip
    return out


# --- many tokens


class GroupedPlan(NamedTuple):
    """A tile of a grouped product: tokens, outputs and inputs; tiles in flight; warps."""

    tokens: int
    outputs: int
    inputs: int
    num_stages: int
    num_warps: int


# Up to how many tokens an expert has on average, and the tokens of a tile then.
TOKEN_TILES = ((8, 16), (32, 32), (64, 64))
# By the tokens of a tile, and whether the product is gated. Up to 32, reading takes the time.
PLANS = {
    (16, True): GroupedPlan(16, 32, 256, 3, 4),
    (16, False): GroupedPlan(16, 64, 256, 2, 4),
    (32, True): GroupedPlan(32, 64, 128, 3, 4),
    (32, False): GroupedPlan(32, 64, 128, 3, 4),
    (64, True): GroupedPlan(64, 64, 64, 4, 4),
    (64, False): GroupedPlan(64, 128, 64, 4, 4),
    (128, True): GroupedPlan(128, 128, 64, 4, 8),
    (128, False): GroupedPlan(128, 128, 64, 3, 8),
}


def token_tile(num_pairs: int, num_experts: int) -> int:
    """Tokens of a tile, by how many an expert has on average."""
    mean = num_pairs / num_experts
    return next((tokens for most, tokens in TOKEN_TILES if mean <= most), 128)


def token_tile_borders(num_experts: int, num_chosen: int) -> list[int]:
    """Up to how many tokens each size of token_tile is taken, but for the last."""
    return [most * num_experts // num_chosen for most, _ in TOKEN_TILES]


def grouped_plan(tokens: int, gated: bool, shared_bytes: int) -> GroupedPlan:
    """A plan for 16-bit elements that fits so much shared memory. Measured on an H100."""
    plan = PLANS[tokens, gated]
    rows = plan.tokens + plan.outputs * (2 if gated else 1)
    fit = max(1, shared_bytes // (2 * plan.inputs * rows))
    return plan._replace(num_stages=min(plan.num_stages, fit))


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _grouped_kernel(
    x, x_scales, weight, scales, weights, counts, pairs, out, num_tokens, num_rows,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, DIVISOR: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr, SCALED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N outputs of up to BLOCK_M pairs of one expert.

    Row pair // DIVISOR of x is multiplied with the expert's weight [N, K]; GATED: [2 N, K], and
    SiLU(gate) * up follows; else the pair's weight. Programs of the same pairs are neighbours, then
    those of the same expert, so that both are read from memory once. TMA: `weight` is a descriptor.
    `scales`, if it is FP8, has one for SCALED_ROWS rows of an expert, which BLOCK_N divides, and
    BLOCK_K inputs; x_scales, if x is FP8 too, [K / BLOCK_K, num_rows].
    """
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = 2 * N if GATED else N
    tile = tl.program_id(0) // TILES_N
    column = tl.program_id(0) % TILES_N * BLOCK_N
    experts = tl.arange(0, BLOCK_E)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    numbers = tl.load(counts + experts, mask=experts < EXPERTS, other=0)
    tiles = (numbers + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    if tile < tl.max(ends, axis=0):
        expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
        is_own = experts == expert
        first = (tile - tl.sum(tl.where(is_own, ends - tiles, 0), axis=0)) * BLOCK_M
        number = tl.sum(tl.where(is_own, numbers, 0), axis=0)
        places = first + tl.arange(0, BLOCK_M)
        row_mask = places < number
        bucket = pairs + expert.to(tl.int64) * num_tokens
        own = tl.load(bucket + places, mask=row_mask, other=0)
        rows = x + (own // DIVISOR).to(tl.int64)[:, None] * K
        columns = column + tl.arange(0, BLOCK_N)
        column_mask = columns < N
        first_row = expert * ROWS + column
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            v = tl.load(rows + k[None, :], mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
            if TMA:
                w = weight.load([first_row, start])
            else:
                matrix = weight + first_row.to(tl.int64) * K
                inner = tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
                mask = column_mask[:, None] & (k < K)[None, :]
                w = tl.load(matrix + inner, mask=mask, other=0.0)
            shares = 1.0
            if x_scales is not None:
                own_scales = x_scales + start // BLOCK_K * num_rows + own // DIVISOR
                shares = tl.load(own_scales, mask=row_mask, other=0.0)[:, None]
            row = first_row
            acc = add_product(
                acc, v, w, scales, row, start, shares, K, BLOCK_K, SCALED_ROWS, PRECISION
            )
            if GATED:
                row = first_row + N
                if TMA:
                    w = weight.load([row, start])
                else:
                    w = tl.load(matrix + N * K + inner, mask=mask, other=0.0)
                up = add_product(
                    up, v, w, scales, row, start, shares, K, BLOCK_K, SCALED_ROWS, PRECISION
                )
        dtype: tl.constexpr = out.dtype.element_ty
        if GATED:
            acc = silu_times(acc.to(dtype), up.to(dtype), dtype)
        else:
            share = tl.load(weights + own, mask=row_mask, other=0.0)
            acc = acc.to(dtype).to(tl.float32) * share[:, None]
        pointers = out + own.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(pointers, acc, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _combine_kernel(
    y, residual, out, CHOSEN: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK outputs of a token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOSEN):
        row = y + (token * CHOSEN + choice) * N
        total += tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * N + columns, total, mask=mask)


def grouped_experts(
    x: Tensor,
    gate_up: Stored,
    down: Stored,
    logits: Tensor,
    num_chosen: int,
    renormalized: bool,
    residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + run_experts(x) for any number of tokens, routed by their logits. Twins: both.

    Args:
        x: [num_tokens, hidden_size], contiguous.
        gate_up, down: as for few_tokens_experts.
        logits: [num_tokens, num_experts], contiguous.
        residual: [num_tokens, hidden_size], contiguous, or None: nothing is added.

    Returns:
        [num_tokens, hidden_size]: `out`, if given, which must be contiguous.
    """
    (num_tokens, hidden_size), (num_experts, _, size) = x.shape, down.shape
    assert x.is_contiguous()
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    buckets = Buckets(
        logits.new_zeros(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts, num_tokens, dtype=torch.int32),
    )
    weights, _ = route(logits, num_chosen, renormalized, buckets)
    num_pairs = num_tokens * num_chosen
    y = x.new_empty(num_pairs, size)
    _grouped_product(x, gate_up, None, buckets, y, num_chosen, gated=True)
    z = x.new_empty(num_pairs, hidden_size)
    _grouped_product(y, down, weights, buckets, z, 1, gated=False)
    out = torch.empty_like(x) if out is None else out
    block = min(1024, triton.next_power_of_2(hidden_size))
    launch(
        _combine_kernel, (num_tokens, triton.cdiv(hidden_size, block)), x,
        z, residual, out, CHOSEN=num_chosen, N=hidden_size, BLOCK=block,
    )  # fmt: skip
    return out


def _parts(weight: Stored) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Values, scales and what shares one of a stack of matrices, which may be FP8."""
    if isinstance(weight, Fp8Weight):
        assert weight.values.is_contiguous() and weight.scales.is_contiguous()
        return weight.values, weight.scales, weight.block
    assert weight.is_contiguous()
    return weight, None, (1, 1)


def _grouped_product(
    x: Tensor,
    weight: Stored,
    weights: Tensor | None,
    buckets: Buckets,
    out: Tensor,
    divisor: int,
    gated: bool,
) -> None:
    (num_experts, num_rows, input_size), num_pairs = weight.shape, len(out)
    matrix: Tensor | TensorDescriptor
    matrix, scales, (scaled_rows, scaled_inputs) = _parts(weight)
    output_size = num_rows // 2 if gated else num_rows
    shared_bytes = shared_memory(x.device) * 2 // x.element_size()
    tokens = token_tile(num_pairs, num_experts)
    plan = grouped_plan(tokens, gated, shared_bytes)
    tma = has_tma(x.device) and x.element_size() == 2 and input_size % 8 == 0
    x_scales = None
    if scales is not None:
        plan = plan._replace(inputs=scaled_inputs, outputs=min(plan.outputs, scaled_rows))
        if tokens >= 64 and scaled_inputs == BLOCK:
            rows = quantize_rows(x)
            x, x_scales = rows.values, rows.scales
    # At most one tile an expert is not full.
    num_tiles = min(num_pairs, num_pairs // tokens + num_experts)
    if tma:
        matrix = TensorDescriptor.from_tensor(matrix.flatten(0, 1), [plan.outputs, plan.inputs])
    launch(
        _grouped_kernel, (num_tiles * triton.cdiv(output_size, plan.outputs),), x,
        x, x_scales, matrix, scales, weights, *buckets, out, buckets.pairs.size(1), len(x),
        EXPERTS=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), DIVISOR=divisor,
        N=output_size, K=input_size, BLOCK_M=plan.tokens, BLOCK_N=plan.outputs,
        BLOCK_K=plan.inputs, STAGES=plan.num_stages, GATED=gated, TMA=tma, SCALED_ROWS=scaled_rows,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=plan.num_warps,
    )  # fmt: skip
