"""Linear layers for one or two tokens, with what stands before and after them.

There a linear layer reads its weights and does next to nothing else, so what counts is that the
memory never rests. Twins: modules of nanovllm.layers one after the other, which round at the same
places.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.fused import silu_times
from nanovllm.kernels.launch import launch
from nanovllm.utils.quantization import Fp8Weight

MAX_TOKENS = 2


@triton.jit
def _scaled(v, scales, factors, tile: tl.constexpr) -> tl.tensor:
    """What a tile of an FP8 weight is to be multiplied with, as [1, inputs]."""
    if scales is None:
        return v[None, :]
    else:
        return (v * factors[tile])[None, :]


@triton.jit
def _matvec_kernel(
    x, norm_weight, weight, scales, bias, residual, out, eps, TOKENS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    TILES: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, SCALED_ROWS: tl.constexpr,
    SCALED_INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS outputs of every token.

    Its rows of the weight, in TILES tiles, are on their way before it waits for x. GATED: output
    n is silu(row n) * row (N + n). The weight is [N, K], or [2 N, K] if GATED. `scales`, if it is
    FP8, has one for SCALED_ROWS rows, among which are all of the program's, and SCALED_INPUTS.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    places = rows.to(tl.int64)[:, None] * K
    dtype: tl.constexpr = x.dtype.element_ty
    tiles = ()
    gains = ()
    factors = ()
    for tile in tl.static_range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (k < K)[None, :]
        tiles += (tl.load(weight + places + k[None, :], mask=mask, other=0.0),)
        if GATED:
            up = tl.load(weight + N * K + places + k[None, :], mask=mask, other=0.0)
            tiles += (up,)
        if scales is not None:
            own = scales + tl.program_id(0) * ROWS // SCALED_ROWS * (K // SCALED_INPUTS)
            own += k // SCALED_INPUTS
            factors += (tl.load(own, mask=k < K, other=0.0),)
            if GATED:
                own += N // SCALED_ROWS * (K // SCALED_INPUTS)
                factors += (tl.load(own, mask=k < K, other=0.0),)
        if NORM:
            gains += (tl.load(norm_weight + k, mask=k < K, other=0.0),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for token in tl.static_range(TOKENS):
        inputs = ()
        square = tl.zeros([BLOCK_K], tl.float32)
        for tile in tl.static_range(TILES):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            v = tl.load(x + token * K + k, mask=k < K, other=0.0).to(tl.float32)
            square += v * v
            inputs += (v,)
        if NORM:
            scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
        y = tl.zeros([ROWS, BLOCK_K], tl.float32)
        z = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for tile in tl.static_range(TILES):
            v = inputs[tile]
            if NORM:
                v = (v * scale).to(dtype).to(tl.float32) * gains[tile].to(tl.float32)
                v = v.to(dtype).to(tl.float32)
            if GATED:
                y += tiles[2 * tile].to(tl.float32) * _scaled(v, scales, factors, 2 * tile)
                z += tiles[2 * tile + 1].to(tl.float32) * _scaled(v, scales, factors, 2 * tile + 1)
            else:
                y += tiles[tile].to(tl.float32) * _scaled(v, scales, factors, tile)
        total = tl.sum(y, axis=1)
        if bias is not None:
            total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
        if GATED:
            total = silu_times(total.to(dtype), tl.sum(z, axis=1).to(dtype), dtype)
        if residual is not None:
            total = total.to(dtype).to(tl.float32)
            total += tl.load(residual + token * N + rows, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(out + token * N + rows, total, mask=row_mask)


def matvec_config(num_tokens: int, input_size: int, norm: bool) -> tuple[int, int, int]:
    """Outputs a program, inputs a tile, warps. Measured on an H100.

    Few outputs a program, except where each program has a norm to compute as well. Tiles as large
    as fit with little padding, and 8 inputs or more a thread: then x lies in registers as the
    weights do, and need not be exchanged.
    """
    block = min(4096, triton.next_power_of_2(input_size))
    while block > 1024 and triton.cdiv(input_size, block) * block > 1.125 * input_size:
        block //= 2
    rows = 16 // num_tokens if norm and input_size <= 1024 else 1 if input_size > 8192 else 2
    return rows, block, 8 if block >= 2048 and input_size > 2048 else 4


def fp8_matvec_config(
    num_tokens: int, input_size: int, norm: bool, gated: bool
) -> tuple[int, int, int]:
    """Likewise for FP8 weights: a thread converts 8 of them at a time."""
    block = min(1024, triton.next_power_of_2(input_size))
    rows = 1 if input_size > 8192 else 8 if norm and not gated else 4
    return max(1, rows // num_tokens), block, 4


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """residual + linear(rms_norm(x)), for at most MAX_TOKENS tokens, in one launch.

    Twins, one after the other: rms_norm, F.linear, silu_and_mul if gated, add.

    Args:
        x: [num_tokens, input_size], contiguous.
        weight: [output_size, input_size], contiguous, in x's dtype; gated: twice as many rows,
            gate over up.
        bias: [output_size]; not with gated.
        norm_weight: [input_size], or None: no norm.
        residual: [num_tokens, output_size], contiguous, to be added to the rounded output.
        scales: of an FP8 weight, contiguous: see utils.quantization.Fp8Weight.

    Returns:
        [num_tokens, output_size]: `out`, if given, which must be contiguous.
    """
    num_tokens, input_size = x.shape
    output_size = len(weight) // (2 if gated else 1)
    assert num_tokens <= MAX_TOKENS and weight.size(1) == input_size
    assert x.is_contiguous() and weight.is_contiguous() and not (gated and bias is not None)
    assert residual is None or residual.is_contiguous()
    out = x.new_empty(num_tokens, output_size) if out is None else out
    if num_tokens == 0:
        return out
    norm = norm_weight is not None
    rows, block, num_warps = matvec_config(num_tokens, input_size, norm)
    scaled_rows = scaled_inputs = 1
    if scales is not None:
        scaled_rows, scaled_inputs = Fp8Weight(weight, scales).block
        rows, block, num_warps = fp8_matvec_config(num_tokens, input_size, norm, gated)
        rows = min(rows, scaled_rows)
        assert scales.is_contiguous() and scaled_rows % rows == 0 and output_size % scaled_rows == 0
    launch(
        _matvec_kernel, (triton.cdiv(output_size, rows),), x,
        x, norm_weight, weight, scales, bias, residual, out, eps, TOKENS=num_tokens, N=output_size,
        K=input_size, ROWS=rows, BLOCK_K=block, TILES=triton.cdiv(input_size, block),
        NORM=norm, GATED=gated, SCALED_ROWS=scaled_rows,
        SCALED_INPUTS=scaled_inputs, num_warps=num_warps,
    )  # fmt: skip
    return out
