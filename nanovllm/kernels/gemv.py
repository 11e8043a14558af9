"""Linear layers for small batches, with what stands before and after them.

There a linear layer reads its weights and does next to nothing else, so what counts is that the
memory never rests. Twins: modules of nanovllm.layers one after the other, which round at the same
places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.device import shared_memory
from nanovllm.kernels.fused import silu_times
from nanovllm.kernels.launch import launch

# Each further token is another pass over the weights in registers; cuBLAS is faster from 3 on, and
# in layers with thousands of inputs from 2 on.
MAX_TOKENS = 2


@triton.jit
def _matvec_kernel(
    x, norm_weight, weight, bias, residual, out, eps, TOKENS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS outputs of every token.

    Its rows of the weight, in TILES tiles, are on their way before it waits for x. GATED: output
    n is silu(row n) * row (N + n). The weight is [N, K], or [2 N, K] if GATED.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    places = rows.to(tl.int64)[:, None] * K
    dtype: tl.constexpr = x.dtype.element_ty
    tiles = ()
    gains = ()
    for tile in tl.static_range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (k < K)[None, :]
        tiles += (tl.load(weight + places + k[None, :], mask=mask, other=0.0),)
        if GATED:
            up = tl.load(weight + N * K + places + k[None, :], mask=mask, other=0.0)
            tiles += (up,)
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
                y += tiles[2 * tile].to(tl.float32) * v[None, :]
                z += tiles[2 * tile + 1].to(tl.float32) * v[None, :]
            else:
                y += tiles[tile].to(tl.float32) * v[None, :]
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


def _matvec(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    config: tuple[int, int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    num_tokens, input_size = x.shape
    output_size = len(weight) // (2 if gated else 1)
    assert 0 < num_tokens <= MAX_TOKENS and weight.size(1) == input_size
    assert x.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = x.new_empty(num_tokens, output_size) if out is None else out
    rows, block, num_warps = config or matvec_config(num_tokens, input_size, norm is not None)
    norm_weight, eps = norm or (None, 0.0)
    launch(
        _matvec_kernel, (triton.cdiv(output_size, rows),), x,
        x, norm_weight, weight, bias, residual, out, eps, TOKENS=num_tokens, N=output_size,
        K=input_size, ROWS=rows, BLOCK_K=block, TILES=triton.cdiv(input_size, block),
        NORM=norm is not None, GATED=gated, num_warps=num_warps,
    )  # fmt: skip
    return out


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    config: tuple[int, int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x)), for at most MAX_TOKENS tokens. Twins: rms_norm, F.linear.

    Args:
        x: [num_tokens, input_size], contiguous.
        norm_weight: [input_size].
        weight: [output_size, input_size], contiguous, in x's dtype. bias: [output_size].

    Returns:
        [num_tokens, output_size]: `out`, if given, which must be contiguous.
    """
    return _matvec(x, weight, (norm_weight, eps), bias=bias, config=config, out=out)


def rms_norm_gate_up(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    """silu_and_mul(linear(rms_norm(x))), for at most MAX_TOKENS tokens.

    Twins: rms_norm, F.linear, silu_and_mul.

    Args:
        x: [num_tokens, hidden_size]. weight: [2 * intermediate_size, hidden_size], gate over up.

    Returns:
        [num_tokens, intermediate_size].
    """
    return _matvec(x, weight, (norm_weight, eps), gated=True, config=config)


def linear_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    """residual + linear(x), for at most MAX_TOKENS tokens. Twins: F.linear, add.

    Args:
        x: [num_tokens, input_size]. residual: [num_tokens, output_size]. All contiguous.

    Returns:
        [num_tokens, output_size].
    """
    return _matvec(x, weight, bias=bias, residual=residual, config=config)


@triton.jit(do_not_specialize=["num_tokens"])
def _small_linear_kernel(
    x, weight, bias, out, num_tokens, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N outputs of BLOCK_M tokens."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    column_mask = (columns < N)[:, None]
    token_mask = (tokens < num_tokens)[:, None]
    w_rows = weight + columns.to(tl.int64)[:, None] * K
    x_rows = x + tokens[:, None] * K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k_mask = (first + k < K)[None, :]
        w = tl.load(w_rows + first + k[None, :], mask=column_mask & k_mask, other=0.0)
        v = tl.load(x_rows + first + k[None, :], mask=token_mask & k_mask, other=0.0)
        acc = tl.dot(v, w.T, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    places = out + tokens[:, None] * N + columns[None, :]
    tl.store(places, acc, mask=token_mask & (columns < N)[None, :])


def small_linear_tiles(
    num_tokens: int, output_size: int, element_size: int, shared_bytes: int
) -> tuple[int, int, int]:
    """Tokens and outputs a tile and tiles of 256 inputs in flight, in so much shared memory."""
    tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))
    outputs = 16 if output_size <= 2048 else 32
    stage_bytes = (tokens + outputs) * 256 * element_size
    return tokens, outputs, max(1, min(4, shared_bytes // stage_bytes))


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer for a batch of up to 64 tokens. Twin: F.linear.

    Args:
        x: [num_tokens, input_size], contiguous.
        weight: [output_size, input_size], contiguous, in x's dtype. bias: [output_size].

    Returns:
        [num_tokens, output_size].
    """
    num_tokens, input_size = x.shape
    output_size = len(weight)
    assert x.is_contiguous() and weight.is_contiguous()
    out = x.new_empty(num_tokens, output_size)
    block_m, block_n, num_stages = small_linear_tiles(
        num_tokens, output_size, x.element_size(), shared_memory(x.device)
    )
    launch(
        _small_linear_kernel, (triton.cdiv(output_size, block_n), triton.cdiv(num_tokens, block_m)),
        x, x, weight, bias, out, num_tokens, N=output_size, K=input_size, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_K=256, STAGES=num_stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out
