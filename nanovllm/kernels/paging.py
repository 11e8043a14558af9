"""Where the keys of a sequence lie in the paged cache."""

import triton
import triton.language as tl


@triton.jit
def key_places(
    table, first, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Slots of keys first .. first + TILE - 1 of a sequence, those before end.

    first % TILE is 0. A slot is the sum of a number int64, since slot * stride passes 2^31 in a
    large pool, and of one [TILE].
    """
    positions = first + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        return block * BLOCK_SIZE + first % BLOCK_SIZE, tl.arange(0, TILE)
    else:
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < end, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        return tl.zeros([], tl.int64), slots
