"""What the kernels for Hopper (sm_90) share. They are written in Gluon, Triton's lower level.

Such a kernel divides a program's warps by role. One producer warp does nothing but ask the copy
engine (TMA) for tiles, into the stages of a ring in shared memory; consumer warps feed the tensor
cores from there. Two barriers a stage pass it to and fro: `full` once the bytes have come, `empty`
once the consumers are done with it. A phase bit tells this round of the ring from the one before.

The programs are persistent, one an SM: while one tile's results are stored, the next one's inputs
are already on their way.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed them.
if hasattr(tma, "async_load"):
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory, for TMA and tensor cores alike."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[dtype])


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of tiles [rows, columns] of a matrix of 16-bit elements, 0 outside it.

    Args:
        matrix: rows contiguous; begins, as each row does, at a multiple of 16 bytes.
    """
    layout = tile_layout(rows, columns, matrix.dtype)
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, columns], layout)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.shared_memory_descriptor:
    """A barrier a stage, which completes a phase when so many have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=ARRIVALS)
    return barriers
