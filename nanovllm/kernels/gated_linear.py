"""The gated half of the MLP for a long prefill: SiLU(gate) * up leaves the matrix product itself.

Twin: silu_and_mul of F.linear. As a matrix product alone cuBLAS is 2 % faster; but its output,
twice as wide, has to be written and read again. For Hopper only: see kernels.hopper.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.device import num_sms
from nanovllm.kernels.hopper import async_load, async_store, descriptor, new_barriers
from nanovllm.kernels.launch import launch

# Measured on an H100. The sums of gate and up for a tile fill the registers of two warp groups, and
# the stages, with a tile of outputs, shared memory.
TILE_TOKENS = 128
TILE_OUTPUTS = 128
TILE_INPUTS = 64
NUM_STAGES = 4
TOKEN_TILES_A_GROUP = 16


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows take turns with a tile of the weight, from L2."""
    group, place = tile // (GROUP * tiles_n), tile % (GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + place % height, place // height


@gluon.jit
def _load_tiles(
    x, weight, x_ring, w_ring, full, empty, tiles_m, tiles_n, N: gl.constexpr, K: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The producer."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1] // 2
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        for k in range(0, K, BLOCK_K):
            stage = count % STAGES
            bar, w = full.index(stage), w_ring.index(stage)
            gate, up = w.slice(0, BLOCK_N), w.slice(BLOCK_N, BLOCK_N)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(bar, (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
            async_load(x, [m * BLOCK_M, k], bar, x_ring.index(stage))
            async_load(weight, [n * BLOCK_N, k], bar, gate)
            async_load(weight, [N + n * BLOCK_N, k], bar, up)
            count += 1


@gluon.jit
def _multiply_tiles(
    out, x_ring, w_ring, out_tile, full, empty, tiles_m, tiles_n, K: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The consumer, two warp groups."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1] // 2
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    dtype: gl.constexpr = out_tile.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * BLOCK_N, 16])
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        acc = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            w = w_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage), w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=k > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
        gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute((0, 2, 1)).split()
        # Rounded where the twins round.
        gate = gate.to(dtype).to(gl.float32)
        activated = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
        y = activated * up.to(dtype).to(gl.float32)
        tma.store_wait(0)  # the tile before has left shared memory
        out_tile.store(y.to(dtype))
        fence_async_shared()
        async_store(out, [m * BLOCK_M, n * BLOCK_N], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens"])
def _gated_linear_kernel(
    x, weight, out, num_tokens, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tensors come as descriptors. Output n is silu(row n) * row (N + n) of a weight [2 N, K]."""
    dtype: gl.constexpr = x.dtype
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_K: gl.constexpr = x.block_shape[1]
    BLOCK_N: gl.constexpr = out.block_shape[1]
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * BLOCK_N, BLOCK_K], weight.layout)
    out_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], out.layout)
    full, empty = new_barriers(STAGES, 1), new_barriers(STAGES, 1)
    fence_async_shared()
    if PDL:  # the other warps start only after this
        gdc_wait()
        gdc_launch_dependents()
    tiles_m, tiles_n = gl.cdiv(num_tokens, BLOCK_M), gl.cdiv(N, BLOCK_N)
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                out, x_ring, w_ring, out_tile, full, empty, tiles_m, tiles_n, K, GROUP,
            )),
            (_load_tiles, (x, weight, x_ring, w_ring, full, empty, tiles_m, tiles_n, N, K, GROUP)),
        ],
        [1], [40],
    )  # fmt: skip


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu_and_mul(linear(x)), the wide intermediate never written.

    Args:
        x: [num_tokens, input_size] bf16 or fp16, contiguous.
        weight: [2 * output_size, input_size], contiguous, gate over up, in x's dtype. Both sizes
            are multiples of 8.

    Returns:
        [num_tokens, output_size].
    """
    num_tokens, input_size = x.shape
    output_size = len(weight) // 2
    assert x.is_contiguous() and weight.is_contiguous() and weight.size(1) == input_size
    out = x.new_empty(num_tokens, output_size)
    num_tiles = triton.cdiv(num_tokens, TILE_TOKENS) * triton.cdiv(output_size, TILE_OUTPUTS)
    launch(
        _gated_linear_kernel, (min(num_tiles, num_sms(x.device)),), x,
        descriptor(x, TILE_TOKENS, TILE_INPUTS), descriptor(weight, TILE_OUTPUTS, TILE_INPUTS),
        descriptor(out, TILE_TOKENS, TILE_OUTPUTS), num_tokens, N=output_size, K=input_size,
        GROUP=TOKEN_TILES_A_GROUP, STAGES=NUM_STAGES, num_warps=8,
    )  # fmt: skip
    return out
