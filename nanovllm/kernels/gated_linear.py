"""The gated half of the MLP for a long prefill: SiLU(gate) * up leaves the matrix product itself.

Twin: silu_and_mul of F.linear. As a matrix product alone cuBLAS is faster; but its output, twice as
wide, has to be written and read again.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.device import is_hopper, shared_memory
from nanovllm.kernels.fused import silu_times
from nanovllm.kernels.launch import launch

TILE_INPUTS = 64
TOKEN_TILES_A_GROUP = 32


@triton.jit
def _load_tile(pointers, mask, EVEN: tl.constexpr) -> tl.tensor:
    """A tile of a matrix, 0 outside; EVEN: tiles divide it, and no mask slows the load."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_linear_kernel(
    x, weight, out, num_tokens, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for a tile [BLOCK_M, BLOCK_N]. Output n is silu(row n) * row (N + n).

    GROUP tiles of tokens take turns with the same tile of the weight, which stays in L2.
    """
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    GROUP_TILES: tl.constexpr = GROUP * ((N + BLOCK_N - 1) // BLOCK_N)
    group, place = tl.program_id(0) // GROUP_TILES, tl.program_id(0) % GROUP_TILES
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tokens = (group * GROUP + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    # What lies outside is computed from the last row, and not stored: loads without a mask.
    x_rows = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * K + k[None, :]
    w_rows = weight + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = first + k < K
        v = _load_tile(x_rows + first, inside[None, :], EVEN)
        w_gate = _load_tile(w_rows + first, inside[:, None], EVEN)
        w_up = _load_tile(w_rows + N * K + first, inside[:, None], EVEN)
        gate = tl.dot(v, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(v, w_up, up, input_precision=PRECISION)
    dtype: tl.constexpr = out.dtype.element_ty
    y = silu_times(gate.to(dtype), up.to(dtype), dtype)
    mask = (tokens < num_tokens)[:, None] & (columns < N)[None, :]
    tl.store(out + tokens.to(tl.int64)[:, None] * N + columns[None, :], y, mask=mask)


def min_tokens(weight: Tensor) -> float:
    """From how many tokens this was measured to be faster than cuBLAS and silu_and_mul.

    On an H100, where a layer has few inputs: infinitely many elsewhere.
    """
    few_inputs = weight.element_size() == 2 and weight.size(1) <= 1024
    return 2048 if few_inputs and is_hopper(weight.device) else math.inf


class GatedLinearTiles(NamedTuple):
    """Tokens and outputs a tile, tiles of inputs in flight, warps."""

    tokens: int
    outputs: int
    num_stages: int
    num_warps: int


def gated_linear_tiles(dtype: torch.dtype, shared_bytes: int) -> GatedLinearTiles:
    """Tiles that fit so much shared memory. Measured on an H100."""
    if dtype == torch.float32:
        return GatedLinearTiles(32, 32, 1, 4)
    stage_bytes = 2 * TILE_INPUTS * (128 + 2 * 128)
    return GatedLinearTiles(128, 128, min(4, shared_bytes // stage_bytes), 8)


def gated_linear(x: Tensor, weight: Tensor, tiles: GatedLinearTiles | None = None) -> Tensor:
    """silu_and_mul(linear(x)), the wide intermediate never written.

    Args:
        x: [num_tokens, input_size], contiguous.
        weight: [2 * output_size, input_size], contiguous, gate over up, in x's dtype.

    Returns:
        [num_tokens, output_size].
    """
    num_tokens, input_size = x.shape
    output_size = len(weight) // 2
    assert x.is_contiguous() and weight.is_contiguous() and weight.size(1) == input_size
    tiles = tiles or gated_linear_tiles(x.dtype, shared_memory(x.device))
    out = x.new_empty(num_tokens, output_size)
    grid = triton.cdiv(num_tokens, tiles.tokens) * triton.cdiv(output_size, tiles.outputs)
    launch(
        _gated_linear_kernel, (grid,), x, x, weight, out, num_tokens, N=output_size, K=input_size,
        BLOCK_M=tiles.tokens, BLOCK_N=tiles.outputs, BLOCK_K=TILE_INPUTS, GROUP=TOKEN_TILES_A_GROUP,
        STAGES=tiles.num_stages, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
