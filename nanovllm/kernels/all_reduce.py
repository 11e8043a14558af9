"""Sums over the GPUs of one machine, which read and write one another's memory.

Twins: the methods of nanovllm.utils.parallel.HostGroup, which give the same but for rounding. What
makes them faster than NCCL is that their launches overlap with others' (see has_pdl): while ranks
wait for one another, the weights of the next layer are on their way.

Program n of a rank meets program n of the others: each has a place for each of the others to tell
how many times it has been there. So nothing needs to be reset, and a rank that waits in vain can be
freed by a large number.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import launch

MAX_PROGRAMS = 128
NUM_WARPS = 8
LOAD_BYTES = 16  # a thread's


class Peers(NamedTuple):
    """All ranks' memory, as one of them sees it.

    buffers, meetings: int64 [num_ranks], where each rank's data and its places for meetings (int64
    [MAX_PROGRAMS, num_ranks]) begin. counts: int64 [MAX_PROGRAMS], this rank's meetings so far.
    """

    buffers: Tensor
    meetings: Tensor
    counts: Tensor
    rank: int
    num_ranks: int


@triton.jit
def _tell(places, value, PTX: tl.constexpr) -> None:
    """Write where another GPU looks: who reads it there sees all that was written here before."""
    if PTX:  # by the first warp alone
        tl.inline_asm_elementwise(
            """{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x;
            setp.lt.u32 first, thread, 32; @first st.release.sys.global.s64 [$1], $2;
            mov.u32 $0, 0; }""",
            "=r,l,l", [places, value], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(places, value)


@triton.jit
def _hear(places, PTX: tl.constexpr) -> tl.tensor:
    """Read what another GPU has told, and from then on what it had written before."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.s64 $0, [$1];", "=l,l", [places], tl.int64,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(places, volatile=True)


@triton.jit
def _meet(meetings, counts, RANK: tl.constexpr, RANKS: tl.constexpr, PTX: tl.constexpr) -> None:
    """Wait until this program has come here on all ranks.

    What they have written before, they see after. All ranks are told, and listened to, at a time.
    """
    program = tl.program_id(0)
    count = tl.load(counts + program) + 1
    ranks = tl.minimum(tl.arange(0, triton.next_power_of_2(RANKS)), RANKS - 1)
    theirs = tl.load(meetings + ranks).to(tl.pointer_type(tl.int64)) + program * RANKS + RANK
    own = tl.load(meetings + RANK).to(tl.pointer_type(tl.int64)) + program * RANKS + ranks
    tl.debug_barrier()  # all threads are here before one of them says so
    _tell(theirs, count + tl.zeros_like(ranks), PTX)
    while tl.min(_hear(own, PTX), axis=0) < count:
        pass
    tl.store(counts + program, count)
    tl.debug_barrier()  # no thread goes on before


@triton.jit
def _memory(buffers, rank, like):
    """Where a rank's elements begin: at a multiple of 16 bytes, so that loads can be as wide."""
    address = tl.load(buffers + rank)
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def _add_up(buffers, offset, places, mask, like, RANKS: tl.constexpr, MAX: tl.constexpr):
    """The sum, in float32 and in the order of the ranks, or the largest of all ranks' elements."""
    for rank in tl.static_range(RANKS):
        values = tl.load(_memory(buffers, rank, like) + offset + places, mask=mask, other=0)
        if rank == 0:
            total = values if MAX else values.to(tl.float32)
        else:
            total = tl.maximum(total, values) if MAX else total + values.to(tl.float32)
    return total


@triton.jit
def _one_shot_kernel(
    buffers, meetings, counts, out, offset, size, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, MAX: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK elements, of all ranks."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    _meet(meetings, counts, RANK, RANKS, PTX)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    tl.store(out + places, _add_up(buffers, offset, places, mask, out, RANKS, MAX), mask=mask)


@triton.jit
def _two_shot_kernel(
    x, buffers, meetings, counts, offset, size, part, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each rank adds up its part, of `part` elements, and writes the sum to all ranks."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    _meet(meetings, counts, RANK, RANKS, PTX)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in tl.range(first, part, tl.num_programs(0) * BLOCK):
        own = start + tl.arange(0, BLOCK)
        places = RANK * part + own
        mask = (own < part) & (places < size)
        total = _add_up(buffers, offset, places, mask, x, RANKS, False).to(x.dtype.element_ty)
        for rank in tl.static_range(RANKS):
            tl.store(_memory(buffers, rank, x) + offset + places, total, mask=mask)
    _meet(meetings, counts, RANK, RANKS, PTX)


@triton.jit
def _gather_kernel(
    buffers, meetings, counts, out, offset, rows, WIDTH: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy all ranks' rows of WIDTH elements, side by side."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    _meet(meetings, counts, RANK, RANKS, PTX)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in tl.range(first, rows * WIDTH, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = places < rows * WIDTH
        targets = places // WIDTH * (RANKS * WIDTH) + places % WIDTH
        for rank in tl.static_range(RANKS):
            values = tl.load(_memory(buffers, rank, out) + offset + places, mask=mask)
            tl.store(out + targets + rank * WIDTH, values, mask=mask)
    _meet(meetings, counts, RANK, RANKS, PTX)  # before a rank overwrites what another reads


def one_shot(x: Tensor, peers: Peers, base: int, out: Tensor, maximum: bool = False) -> Tensor:
    """The sum of all ranks' x, or the largest: each reads what all have.

    Between two that use the same memory there must be another meeting, so that none writes what
    another still reads.

    Args:
        x: contiguous, in this rank's buffer, at the same place on each rank.
        base: where that buffer begins.
        out: where the result goes, contiguous; not what others read at this meeting.
        maximum: of integers.
    """
    block = 32 * NUM_WARPS * LOAD_BYTES // x.element_size()
    while triton.cdiv(x.numel(), block) > MAX_PROGRAMS:
        block *= 2
    launch(
        _one_shot_kernel, (triton.cdiv(x.numel(), block),), x,
        *peers[:3], out, _offset(x, base), x.numel(), RANK=peers.rank, RANKS=peers.num_ranks,
        BLOCK=block, MAX=maximum, PTX=not knobs.runtime.interpret, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def two_shot(x: Tensor, peers: Peers, base: int) -> Tensor:
    """The sum of all ranks' x, in its place: each rank adds up a part for all of them."""
    block = 32 * NUM_WARPS * LOAD_BYTES // x.element_size()
    part = triton.cdiv(triton.cdiv(x.numel(), peers.num_ranks), block) * block
    launch(
        _two_shot_kernel, (min(MAX_PROGRAMS, part // block),), x,
        x, *peers[:3], _offset(x, base), x.numel(), part, RANK=peers.rank, RANKS=peers.num_ranks,
        BLOCK=block, PTX=not knobs.runtime.interpret, num_warps=NUM_WARPS,
    )  # fmt: skip
    return x


def gather(x: Tensor, peers: Peers, base: int) -> Tensor:
    """All ranks' x [num_rows, size], side by side, in new memory."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, peers.num_ranks * width)
    block = 32 * NUM_WARPS * LOAD_BYTES // x.element_size()
    launch(
        _gather_kernel, (min(MAX_PROGRAMS, triton.cdiv(x.numel(), block)),), x,
        *peers[:3], out, _offset(x, base), num_rows, WIDTH=width, RANK=peers.rank,
        RANKS=peers.num_ranks, BLOCK=block, PTX=not knobs.runtime.interpret, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _offset(x: Tensor, base: int) -> int:
    """In elements."""
    return (x.data_ptr() - base) // x.element_size()
