"""BlockManager: who owns which KV block, and which blocks can be reused for a common prefix."""

from array import array
from collections import OrderedDict

import xxhash

from nanovllm.engine.sequence import Sequence


class Block:
    """One KV block. It is *used* while it stands in some block table, otherwise *free*.

    A block whose contents are known carries their hash and token ids, also while it is free; it
    stays findable until it is taken for other contents.
    """

    __slots__ = ("block_hash", "block_id", "ref_count", "token_ids")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0  # in how many block tables it stands
        self.block_hash: int | None = None
        self.token_ids: list[int] = []


class BlockManager:
    """Hands out the blocks of the KV pool and shares full blocks between equal prefixes.

    Invariants: num_free_blocks + num_used_blocks == num_blocks; a block's ref_count is the number
    of block tables it stands in; `_hash_to_block` names only blocks that hold those contents.
    Block objects are made when an id is first taken, so a pool of millions costs nothing.

    Args:
        num_blocks: size of the pool.
        block_size: consecutive token positions a block holds, for all layers.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks: list[Block] = []  # the ids taken at least once: 0 .. len - 1
        self._freed: OrderedDict[int, Block] = OrderedDict()  # oldest first, O(1) removal
        self._hash_to_block: dict[int, Block] = {}

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - self.num_used_blocks

    @property
    def num_used_blocks(self) -> int:
        return len(self._blocks) - len(self._freed)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` consecutive positions take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, seq: Sequence, num_reserved: int = 0) -> bool:
        """Give a sequence without blocks its block table, if the pool has room for it.

        The longest prefix found in the cache is shared and counted as computed; the last token is
        always left to compute, since its logits are needed.

        Args:
            seq: a sequence with an empty block table and no unread token.
            num_reserved: blocks that must stay free after this allocation.

        Returns:
            False, and nothing has changed, if the pool has too few free blocks.
        """
        assert not seq.block_table and seq.num_unread_tokens == 0
        shared = self._find_prefix(seq)
        num_new = self.num_blocks_for(len(seq)) - len(shared)
        num_revived = sum(block.ref_count == 0 for block in shared)
        if num_new + num_revived + num_reserved > self.num_free_blocks:
            return False
        for block in shared:
            if block.ref_count == 0:
                del self._freed[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.block_table.extend(self._take().block_id for _ in range(num_new))
        seq.num_computed_tokens = len(shared) * self.block_size
        if seq.num_completion_tokens == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
        return True

    def needs_block(self, seq: Sequence) -> bool:
        """True if the sequence's last token begins a block that it does not have yet."""
        return self.num_blocks_for(len(seq)) > len(seq.block_table)

    def append_block(self, seq: Sequence) -> None:
        """Give the sequence the block that its last token begins. The pool must have one free."""
        assert self.needs_block(seq)
        seq.block_table.append(self._take().block_id)

    def deallocate(self, seq: Sequence) -> None:
        """Take the sequence's blocks back. Its tail is reused before its head."""
        for block_id in reversed(seq.block_table):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._freed[block_id] = block
        seq.block_table = []
        seq.num_computed_tokens = 0

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Make the blocks that positions start..end-1 complete findable for other sequences.

        The ids of those positions must be known, and their K/V stored by a step that precedes, or
        is, the step of whoever finds them.
        """
        for index in range(start // self.block_size, end // self.block_size):
            block = self._blocks[seq.block_table[index]]
            if block.block_hash is None:
                block.block_hash = self._hash(seq, index)
                block.token_ids = self._tokens(seq, index)
                self._hash_to_block.setdefault(block.block_hash, block)

    def forget_prefixes(self) -> None:
        """Let no block be found any more; those in use stay with their sequences."""
        self._hash_to_block.clear()
        for block in self._blocks:
            self._forget(block)

    def _take(self) -> Block:
        """Remove a block from the free ones: one never used, else the one freed longest ago."""
        if len(self._blocks) < self.num_blocks:
            block = Block(len(self._blocks))
            self._blocks.append(block)
        else:
            _, block = self._freed.popitem(last=False)
            self._forget(block)
        block.ref_count = 1
        return block

    def _forget(self, block: Block) -> None:
        """Drop what the block was known to hold; a twin may stay findable."""
        if block.block_hash is not None and self._hash_to_block.get(block.block_hash) is block:
            del self._hash_to_block[block.block_hash]
        block.block_hash = None
        block.token_ids = []

    def _find_prefix(self, seq: Sequence) -> list[Block]:
        """The known blocks that hold the sequence's first full blocks, short of its last token."""
        found: list[Block] = []
        for index in range((len(seq) - 1) // self.block_size):
            block = self._hash_to_block.get(self._hash(seq, index))
            if block is None or block.token_ids != self._tokens(seq, index):
                break
            found.append(block)
        return found

    def _tokens(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _hash(self, seq: Sequence, index: int) -> int:
        """xxh64 over the hash of the block before and this block's token ids (int64)."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            digest = xxhash.xxh64(seed=0)
            if hashes:
                digest.update(hashes[-1].to_bytes(8, "little"))
            digest.update(array("q", self._tokens(seq, len(hashes))).tobytes())
            hashes.append(digest.intdigest())
        return hashes[index]
