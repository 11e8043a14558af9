"""Linear layers for small batches, where reading the weights takes the time. Twin: F.linear.

What makes them faster than cuBLAS is that their launches overlap with others' (see has_pdl), and
that what follows the matrix product (SiLU * up, the residual) is part of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.device import has_tma, prefetch, shared_memory
from nanovllm.kernels.fused import silu_times
from nanovllm.kernels.launch import launch
from nanovllm.utils.quantization import BLOCK, Fp8Rows, Fp8Weight

MAX_TOKENS = 256
FEW_TOKENS = 64  # up to so many are one tile
TOKEN_BORDERS = (16, *range(64, MAX_TOKENS + 1, 64))  # plans differ up to so many tokens
TILE_OUTPUTS = 32  # of the smallest tile
H100_SMS = 132


@triton.jit
def _load_rows(
    matrix, first_row, first_k, num_rows, K: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A tile [BLOCK, BLOCK_K] of a matrix [num_rows, K] (TMA: its descriptor), 0 outside."""
    if TMA:
        return matrix.load([first_row, first_k])
    else:
        rows = first_row + tl.arange(0, BLOCK)
        k = (first_k + tl.arange(0, BLOCK_K))[None, :]
        pointers = matrix + rows.to(tl.int64)[:, None] * K + k
        if EVEN_ROWS and EVEN_K:  # no mask: a faster load
            return tl.load(pointers)
        elif EVEN_K:
            return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(rows < num_rows)[:, None] & (k < K), other=0.0)


@triton.jit
def add_product(
    acc, v, w, scales, row, k, shares, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED_ROWS: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc + v @ w.T, with the weight's tile from `row` and input `k` on.

    scales: None, or of an FP8 weight, one for SCALED_ROWS rows and BLOCK_K inputs; a tensor core
    itself adds up less exactly. shares: v's own, [tokens, 1], if it is FP8 too; else 1.
    """
    if scales is None:
        return tl.dot(v, w.T, acc, input_precision=PRECISION)
    else:
        place = scales + row // SCALED_ROWS * (K // BLOCK_K) + k // BLOCK_K
        factor = tl.load(place, mask=k < K, other=0.0)
        return acc + tl.dot(v, w.to(v.dtype).T, input_precision=PRECISION) * (factor * shares)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _small_linear_kernel(
    x, x_scales, weight, lines, scales, bias, residual, out, partial, counters, num_tokens,
    num_rows, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    TMA: tl.constexpr, SCALED_ROWS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for one of PARTS parts of the inputs, BLOCK_N outputs and BLOCK_M tokens.

    Programs of the same outputs are neighbours, so that a weight is read from memory once. Of
    several parts' programs the last adds up what all have written. GATED: output n is
    silu(row n) * row (N + n) of a weight [2 N, K]. TMA: x and weight are descriptors, not pointers.
    `scales`, if it is FP8, has one for SCALED_ROWS rows, which BLOCK_N divides, and BLOCK_K inputs;
    x_scales, if x is FP8 too, [K / BLOCK_K, num_rows]. Of `lines`, which is then the weight's
    memory, the first are asked for before the tokens are waited for.
    """
    PART: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    EVEN_K: tl.constexpr = K % (PARTS * BLOCK_K) == 0
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    first_token = tl.program_id(0) % tiles_m * BLOCK_M
    first_column = tl.program_id(0) // tiles_m * BLOCK_N
    start = tl.program_id(1) * PART
    tokens = first_token + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    if PDL:
        if x_scales is not None:
            ahead = tl.minimum(start + tl.arange(0, 4) * BLOCK_K, K - BLOCK_K)
            lines += columns.to(tl.int64)[:, None] * K + ahead[None, :]
            prefetch(lines)
            if GATED:
                prefetch(lines + N * K)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(start, start + PART, BLOCK_K, num_stages=STAGES):
        v = _load_rows(x, first_token, k, num_tokens, K, BLOCK_M, BLOCK_K, False, EVEN_K, TMA)
        row = first_column
        w = _load_rows(weight, row, k, NUM_ROWS, K, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, TMA)
        shares = 1.0
        if x_scales is not None:
            factors = x_scales + k // BLOCK_K * num_rows + tokens
            shares = tl.load(factors, mask=(tokens < num_tokens) & (k < K), other=0.0)[:, None]
        acc = add_product(acc, v, w, scales, row, k, shares, K, BLOCK_K, SCALED_ROWS, PRECISION)
        if GATED:
            row = N + first_column
            w = _load_rows(weight, row, k, NUM_ROWS, K, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, TMA)
            up = add_product(up, v, w, scales, row, k, shares, K, BLOCK_K, SCALED_ROWS, PRECISION)
    own = tokens[:, None]
    if x_scales is not None:  # of any number of tokens
        own = own.to(tl.int64)
    places = own * N + columns[None, :]
    mask = (tokens < num_tokens)[:, None] & (columns < N)[None, :]
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
    """How one launch is divided.

    tokens, outputs, inputs: of a tile. num_stages: tiles in flight. num_parts: of the inputs, a
    program each; 1 if gated. tma: tiles are loaded by descriptors.
    """

    tokens: int
    outputs: int
    inputs: int
    num_stages: int
    num_parts: int = 1
    tma: bool = False


def small_linear_plan(
    num_tokens: int,
    input_size: int,
    output_size: int,
    gated: bool,
    shared_bytes: int,
    descriptors: bool,
) -> SmallLinearPlan:
    """A plan for 16-bit elements that fits so much shared memory. Measured on an H100.

    More stages keep more of a weight on its way; fewer let several programs share an SM, so that
    all programs run at once and none waits for another's end.

    Args:
        descriptors: tiles can be loaded by descriptors.
    """
    few = num_tokens <= FEW_TOKENS
    tokens = 16 if num_tokens <= 16 else 64
    num_tiles = triton.cdiv(num_tokens, tokens)
    # Outputs of a tile, and parts of the inputs: about a program an SM, if the layer gives so many.
    outputs, num_parts = TILE_OUTPUTS, 1
    if not few:
        outputs = triton.next_power_of_2(num_tiles * output_size // H100_SMS)
        outputs = min(64 if gated else 128, max(TILE_OUTPUTS, outputs))
    elif not gated and tokens == 64 and descriptors and output_size >= 96 * 64:
        outputs = 64
    elif not gated:
        num_parts = triton.next_power_of_2(triton.cdiv(100, triton.cdiv(output_size, outputs)))
        num_parts = max(1, min(4, num_parts, input_size // 512))
    # Programs that share an SM's memory: all, if that is up to three; of more, two at a time.
    num_programs = triton.cdiv(output_size, outputs) * num_tiles * num_parts
    sharing = max(1, triton.cdiv(num_programs, H100_SMS))
    if few and gated and tokens == 64:
        sharing = 1  # faster: this loop gains more from stages
    elif sharing > 3:
        sharing = 2
    memory = min(shared_bytes, max(shared_bytes // sharing, 64 * 1024))  # two stages at least
    most = 6 if gated or sharing > 1 else 8
    rows = tokens + outputs * (2 if gated else 1)

    def stages(inputs: int) -> int:
        return max(1, min(most, memory // (2 * inputs * rows)))

    if tokens == 16 and sharing == 1 and not gated and input_size % (256 * num_parts) == 0:
        inputs = 256
    elif stages(128) >= (3 if few else 4):
        inputs = 128
    else:
        inputs = 64
    is_long = tokens == 64 and input_size // num_parts >= 2048
    tma = descriptors and (is_long or not few)
    return SmallLinearPlan(tokens, outputs, inputs, stages(inputs), num_parts, tma)


def fp8_small_linear_plan(input_size: int, gated: bool) -> SmallLinearPlan:
    """A plan for up to 16 tokens of 16 bits and FP8 weights. Measured on an H100."""
    num_parts = 1 if gated else min(4, max(1, input_size // 512))
    return SmallLinearPlan(16, TILE_OUTPUTS, BLOCK, 4, num_parts)


def fp8_rows_plan(
    num_tokens: int, input_size: int, output_size: int, gated: bool, shared_bytes: int, tma: bool
) -> SmallLinearPlan:
    """A plan for FP8 tokens and weights that fits so much shared memory. Measured on an H100."""
    tokens, outputs, num_stages, num_parts = 64, 64, 6, 1
    if gated and num_tokens > 128:
        tokens, num_stages = 128, 3
    elif gated:
        outputs, num_stages = (32, 4) if num_tokens <= 64 else (64, 3)
    elif output_size >= 4096 and num_tokens > (64 if output_size >= 6144 else 128):
        outputs = 128
    elif num_tokens <= 128:
        num_programs = triton.cdiv(output_size, outputs) * triton.cdiv(num_tokens, tokens)
        num_parts = 2 if num_programs <= H100_SMS and output_size < 6144 <= 2 * input_size else 1
        if num_tokens <= 64 and num_programs * num_parts <= H100_SMS:
            num_stages = 8  # one program an SM
    tile_bytes = BLOCK * (tokens + outputs * (2 if gated else 1))
    num_stages = max(1, min(num_stages, shared_bytes // tile_bytes))
    return SmallLinearPlan(tokens, outputs, BLOCK, num_stages, num_parts, tma)


def small_linear_counters(output_size: int, device: torch.device | None = None) -> Tensor:
    """What `small_linear` needs to know when a tile is complete: int32 zeros, one a tile.

    Launches that may overlap in time (other than in one stream) must not share them.
    """
    num_tiles = triton.cdiv(output_size, TILE_OUTPUTS)
    return torch.zeros(num_tiles, dtype=torch.int32, device=device)


def small_linear(
    x: Tensor | Fp8Rows,
    weight: Tensor,
    bias: Tensor | None = None,
    counters: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """A linear layer of up to MAX_TOKENS tokens. Twins: F.linear; gated: silu_and_mul of it.

    Args:
        x: [num_tokens, input_size], contiguous. FP8: of any number of tokens.
        weight: [output_size, input_size], contiguous, in x's dtype; gated: twice as many rows,
            gate over up.
        bias: [output_size]; not with gated.
        counters: from small_linear_counters; None allocates them, which costs a launch.
        residual: [num_tokens, output_size], contiguous, to be added to the rounded output.
        scales: of an FP8 weight, contiguous: see utils.quantization.Fp8Weight. Blocks have a
            multiple of 64 rows, and 128 inputs. If x is not FP8, num_tokens is at most 16.

    Returns:
        [num_tokens, output_size]: `out`, if given, which must be contiguous.
    """
    num_tokens, input_size = len(x), weight.size(1)
    output_size = len(weight) // (2 if gated else 1)
    values, x_scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    assert not (gated and bias is not None) and values.size(1) == input_size
    assert values.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = values.new_empty(num_tokens, output_size, dtype=x.dtype) if out is None else out
    assert out.is_contiguous() and out.shape == (num_tokens, output_size)
    # A descriptor wants rows that begin at multiples of 16 bytes. (Large tiles of float32, which no
    # tensor core multiplies, would not fit the registers.)
    descriptors = has_tma(out.device) and out.element_size() == 2 and input_size % 8 == 0
    scaled_rows = 1
    sizes = num_tokens, input_size, output_size
    if scales is None:
        assert num_tokens <= MAX_TOKENS
        shared_bytes = shared_memory(out.device) * 2 // out.element_size()
        plan = small_linear_plan(*sizes, gated, shared_bytes, descriptors)
    else:
        scaled_rows, scaled_inputs = Fp8Weight(weight, scales).block
        assert scales.is_contiguous() and scaled_rows % 64 == 0 and scaled_inputs == BLOCK
        if x_scales is None:
            plan = fp8_small_linear_plan(input_size, gated)
            assert num_tokens <= plan.tokens
        else:
            plan = fp8_rows_plan(*sizes, gated, shared_memory(out.device), descriptors)
            plan = plan._replace(outputs=min(plan.outputs, scaled_rows))
    num_tiles = triton.cdiv(output_size, plan.outputs) * triton.cdiv(num_tokens, plan.tokens)
    partial = None
    if plan.num_parts == 1:
        counters = None
    else:
        partial = out.new_empty(plan.num_parts, num_tokens, output_size, dtype=torch.float32)
        if counters is None:
            counters = out.new_zeros(num_tiles, dtype=torch.int32)
        assert len(counters) >= num_tiles
    tokens: Tensor | TensorDescriptor = values
    weights: Tensor | TensorDescriptor = weight
    if plan.tma:
        tokens = TensorDescriptor.from_tensor(values, [plan.tokens, plan.inputs])
        weights = TensorDescriptor.from_tensor(weight, [plan.outputs, plan.inputs])
    lines = weight if x_scales is not None else None
    launch(
        _small_linear_kernel, (num_tiles, plan.num_parts), out,
        tokens, x_scales, weights, lines, scales, bias, residual, out, partial, counters,
        num_tokens, len(values), N=output_size, K=input_size, PARTS=plan.num_parts,
        BLOCK_M=plan.tokens, BLOCK_N=plan.outputs, BLOCK_K=plan.inputs, STAGES=plan.num_stages,
        GATED=gated, TMA=plan.tma, SCALED_ROWS=scaled_rows,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out
