"""BlockManager: who owns which KV block, and which blocks a common prefix reuses."""

import random
import tracemalloc
from collections import Counter, OrderedDict
from types import SimpleNamespace

import pytest

from nanovllm import SamplingParams
from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

BLOCK_SIZE = 4


def make_seq(token_ids: list[int]) -> Sequence:
    return Sequence(token_ids, SamplingParams(max_tokens=1000), max_total_tokens=10_000)


def admit(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """Allocate a prompt and publish it, as a prefill step of the whole prompt does."""
    seq = make_seq(token_ids)
    assert manager.allocate(seq)
    manager.publish(seq, seq.num_computed_tokens, len(seq))
    return seq


def grow(manager: BlockManager, seq: Sequence, token_id: int) -> None:
    """Append a token and compute it, as the reading of one decode step and the next one do."""
    seq.num_unread_tokens += 1
    if manager.needs_block(seq):
        manager.append_block(seq)
    seq.append_token(token_id)
    manager.publish(seq, len(seq) - 1, len(seq))


def ref_counts(manager: BlockManager) -> dict[int, int]:
    """The count of each used block."""
    return {block.block_id: block.ref_count for block in manager._blocks if block.ref_count}


def tokens(num_tokens: int, first: int = 0) -> list[int]:
    """`num_tokens` different ids from `first` on."""
    return list(range(first, first + num_tokens))


# Free and used


def test_a_new_pool_is_free() -> None:
    manager = BlockManager(num_blocks=7, block_size=BLOCK_SIZE)
    assert (manager.num_free_blocks, manager.num_used_blocks) == (7, 0)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_blocks_for_a_number_of_tokens(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(8, BLOCK_SIZE).num_blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
def test_a_prompt_takes_the_blocks_that_its_tokens_fill(num_tokens: int) -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    seq = make_seq(tokens(num_tokens))
    assert manager.allocate(seq)
    assert len(seq.block_table) == manager.num_blocks_for(num_tokens) == manager.num_used_blocks
    assert len(set(seq.block_table)) == len(seq.block_table)


def test_deallocate_gives_every_block_back_and_resets_the_sequence() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    seq = admit(manager, tokens(10))
    manager.deallocate(seq)
    assert manager.num_free_blocks == 8
    assert seq.block_table == []
    assert seq.num_computed_tokens == 0


def test_the_whole_pool_can_be_taken_and_not_one_block_more() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    admit(manager, tokens(16))
    assert manager.num_free_blocks == 0
    assert not manager.allocate(make_seq([99]))


def test_a_refused_allocation_changes_nothing() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    first = admit(manager, tokens(8))
    refused = make_seq(tokens(8) + tokens(9, first=50))
    assert not manager.allocate(refused)
    assert refused.block_table == []
    assert refused.num_computed_tokens == refused.num_cached_tokens == 0
    assert ref_counts(manager) == dict.fromkeys(first.block_table, 1)
    assert manager.num_free_blocks == 2


def test_an_allocation_leaves_the_reserved_blocks_free() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    seq = make_seq(tokens(8))
    assert not manager.allocate(seq, num_reserved=3)
    assert manager.allocate(seq, num_reserved=2)
    assert manager.num_free_blocks == 2


def test_reviving_a_free_block_counts_against_the_reserve() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(5)))
    assert not manager.allocate(make_seq(tokens(5)), num_reserved=1)
    assert manager.num_free_blocks == 2


def test_sharing_a_used_block_takes_nothing_from_the_pool() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    admit(manager, tokens(5))
    assert manager.allocate(make_seq(tokens(5)))
    assert manager.num_free_blocks == 0


def test_blocks_are_conserved_over_a_thousand_random_rounds() -> None:
    rng = random.Random(0)
    manager = BlockManager(24, BLOCK_SIZE)
    live: list[Sequence] = []
    num_hits = num_refused = 0
    for _ in range(1000):
        action = rng.choice(["allocate", "allocate", "grow", "deallocate"])
        if action == "allocate":
            seq = make_seq(rng.choices(range(2), k=rng.randint(1, 24)))
            free_before, counts_before = manager.num_free_blocks, ref_counts(manager)
            if manager.allocate(seq):
                manager.publish(seq, seq.num_computed_tokens, len(seq))
                num_hits += seq.num_cached_tokens > 0
                live.append(seq)
            else:
                num_refused += 1
                assert (manager.num_free_blocks, ref_counts(manager)) == (
                    free_before,
                    counts_before,
                )
        elif action == "grow" and live and manager.num_free_blocks:
            grow(manager, rng.choice(live), rng.randrange(2))
        elif action == "deallocate" and live:
            manager.deallocate(live.pop(rng.randrange(len(live))))
        assert manager.num_free_blocks + manager.num_used_blocks == manager.num_blocks
        expected = Counter(block_id for seq in live for block_id in seq.block_table)
        assert ref_counts(manager) == expected
        assert manager.num_used_blocks == len(expected)
    assert num_hits > 50
    assert num_refused > 50
    for seq in live:
        manager.deallocate(seq)
    assert manager.num_free_blocks == manager.num_blocks


# Prefix reuse


def test_a_common_prefix_is_shared_and_counted_as_cached() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = admit(manager, [*tokens(8), 100])
    second = admit(manager, [*tokens(8), 200])
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert ref_counts(manager) == {0: 2, 1: 2, 2: 1, 3: 1}


def test_only_full_blocks_are_shared() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = admit(manager, tokens(7))
    second = admit(manager, tokens(7) + tokens(5, first=7))
    assert second.num_cached_tokens == BLOCK_SIZE
    assert not set(first.block_table[1:]) & set(second.block_table)


def test_a_prompt_shorter_than_a_block_shares_nothing() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first, second = admit(manager, tokens(3)), admit(manager, tokens(3))
    assert second.num_cached_tokens == 0
    assert first.block_table != second.block_table


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_token_is_always_left_to_compute(num_tokens: int, num_cached: int) -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(num_tokens)))
    again = admit(manager, tokens(num_tokens))
    assert again.num_cached_tokens == num_cached < num_tokens


def test_the_shared_prefix_ends_where_the_prompts_differ() -> None:
    manager = BlockManager(16, BLOCK_SIZE)
    admit(manager, [*tokens(12), 0])
    other = [*tokens(12), 0]
    other[5] = 99
    assert admit(manager, other).num_cached_tokens == BLOCK_SIZE


def test_equal_blocks_after_different_prefixes_are_not_shared() -> None:
    manager = BlockManager(16, BLOCK_SIZE)
    first = admit(manager, [1] * 4 + tokens(4) + [0])
    second = admit(manager, [2] * 4 + tokens(4) + [0])
    assert second.num_cached_tokens == 0
    assert not set(first.block_table) & set(second.block_table)


def test_equal_blocks_of_one_prompt_are_told_apart() -> None:
    """Block 1 repeats block 0's ids, but stands at other positions."""
    manager = BlockManager(16, BLOCK_SIZE)
    first = admit(manager, [1] * 9)
    assert len(set(first.block_table)) == 3
    second = admit(manager, [1] * 9)
    assert second.block_table[:2] == first.block_table[:2]


def test_nothing_is_found_before_it_is_published() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    assert manager.allocate(make_seq(tokens(9)))
    assert admit(manager, tokens(9)).num_cached_tokens == 0


def test_publishing_in_chunks_makes_each_block_findable_once_it_is_complete() -> None:
    manager = BlockManager(32, BLOCK_SIZE)
    first = make_seq(tokens(13))
    assert manager.allocate(first)
    num_cached = []
    for start, end in [(0, 3), (3, 4), (4, 7), (7, 10), (10, 12), (12, 13)]:
        manager.publish(first, start, end)
        probe = make_seq(tokens(13))
        assert manager.allocate(probe)
        num_cached.append(probe.num_cached_tokens)
        manager.deallocate(probe)
    assert num_cached == [0, 4, 4, 8, 12, 12]


def test_a_block_filled_by_generated_tokens_is_findable() -> None:
    manager = BlockManager(16, BLOCK_SIZE)
    first = admit(manager, tokens(6))
    for token_id in tokens(2, first=6):
        grow(manager, first, token_id)
    second = admit(manager, tokens(9))
    assert second.num_cached_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]


def test_tokens_recomputed_after_a_preemption_do_not_count_as_cached_prompt() -> None:
    manager = BlockManager(16, BLOCK_SIZE)
    seq = admit(manager, tokens(6))
    for token_id in tokens(4, first=6):
        grow(manager, seq, token_id)
    manager.deallocate(seq)
    assert manager.allocate(seq)
    assert seq.num_computed_tokens == 8
    assert seq.num_cached_tokens == 0


def test_a_block_shared_with_a_live_sequence_outlives_its_first_owner() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    first = admit(manager, tokens(5))
    shared = first.block_table[0]
    second = admit(manager, tokens(5))
    manager.deallocate(first)
    assert ref_counts(manager)[shared] == 1
    taken = admit(manager, tokens(8, first=50))
    assert manager.num_free_blocks == 0
    assert not set(taken.block_table) & set(second.block_table)


def test_a_hit_also_compares_the_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = SimpleNamespace(update=lambda data: None, intdigest=lambda: 7)
    monkeypatch.setattr(
        block_manager_module, "xxhash", SimpleNamespace(xxh64=lambda *_, **__: constant)
    )
    manager = BlockManager(8, BLOCK_SIZE)
    first = admit(manager, [1, 1, 1, 1, 0])
    other = admit(manager, [2, 2, 2, 2, 0])
    same = admit(manager, [1, 1, 1, 1, 0])
    assert other.num_cached_tokens == 0
    assert not set(other.block_table) & set(first.block_table)
    assert same.num_cached_tokens == BLOCK_SIZE
    manager.deallocate(other)
    admit(manager, tokens(4 * manager.num_free_blocks, first=50))  # reuses the other's block
    assert manager.num_free_blocks == 0
    assert manager._find_prefix(make_seq([1, 1, 1, 1, 0]))[0].block_id == first.block_table[0]


def test_large_and_small_ids_are_hashed_alike() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    prompt = [0, 151_935, 2**31, 2**40, 5]
    admit(manager, prompt)
    assert admit(manager, prompt).num_cached_tokens == BLOCK_SIZE


# Freed blocks


def test_freed_blocks_stay_findable() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = admit(manager, tokens(9))
    table = first.block_table
    manager.deallocate(first)
    again = admit(manager, tokens(9))
    assert again.num_cached_tokens == 8
    assert again.block_table[:2] == table[:2]
    assert manager.num_used_blocks == 3
    assert ref_counts(manager) == dict.fromkeys(again.block_table, 1)


def test_blocks_never_used_are_taken_before_freed_ones() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(8)))
    admit(manager, tokens(8, first=50))
    assert manager._find_prefix(make_seq(tokens(9)))


def test_the_block_freed_longest_ago_is_reused_first() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    prompts = [tokens(4, first=10 * index) for index in range(3)]
    seqs = [admit(manager, prompt) for prompt in prompts]
    for index in (1, 0, 2):
        manager.deallocate(seqs[index])
    found = []
    for first in (100, 200, 300):
        admit(manager, [first])
        found.append([bool(manager._find_prefix(make_seq([*p, 0]))) for p in prompts])
    assert found == [[True, False, True], [False, False, True], [False, False, False]]


def test_a_block_that_was_revived_and_freed_again_counts_as_freed_last() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    old, new = admit(manager, tokens(4)), admit(manager, tokens(4, first=10))
    manager.deallocate(old)
    manager.deallocate(new)
    manager.deallocate(admit(manager, tokens(5)))  # revives old's block, and takes a third one
    manager.deallocate(admit(manager, tokens(5)))  # a fourth
    admit(manager, [100])
    assert manager._find_prefix(make_seq(tokens(5)))
    assert not manager._find_prefix(make_seq([*tokens(4, first=10), 0]))


def test_the_tail_of_a_sequence_is_reused_before_its_head() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(12)))
    num_found = []
    for first in (50, 60, 70):
        admit(manager, [first])
        num_found.append(len(manager._find_prefix(make_seq(tokens(13)))))
    assert num_found == [2, 1, 0]


def test_a_reused_block_is_not_found_under_its_old_contents() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(8)))
    other = tokens(8, first=50)
    manager.deallocate(admit(manager, other))
    assert not manager._find_prefix(make_seq(tokens(9)))
    assert len(manager._find_prefix(make_seq([*other, 0]))) == 2


def test_a_reused_block_is_unknown_until_it_is_published_again() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(8)))
    seq = make_seq(tokens(8, first=50))
    assert manager.allocate(seq)
    assert not manager._find_prefix(make_seq(tokens(9)))
    assert not manager._find_prefix(make_seq(tokens(9, first=50)))


def test_an_allocation_does_not_overwrite_the_free_blocks_it_shares() -> None:
    """The shared block is the one that would be reused first."""
    manager = BlockManager(2, BLOCK_SIZE)
    manager.deallocate(admit(manager, tokens(5)))
    other = admit(manager, [99])  # takes the tail; the head is the only free block now
    manager.deallocate(other)
    again = admit(manager, tokens(5))
    assert again.num_cached_tokens == BLOCK_SIZE
    assert len(set(again.block_table)) == 2


def test_contents_computed_twice_survive_the_reuse_of_either_copy() -> None:
    """Neither sequence was published when the other was allocated, so each computed its own."""
    for reused, kept in [(0, 1), (1, 0)]:
        manager = BlockManager(2, BLOCK_SIZE)
        twins = [make_seq(tokens(4)) for _ in range(2)]
        for seq in twins:
            assert manager.allocate(seq)
        for seq in twins:
            manager.publish(seq, 0, 4)
        kept_block = twins[kept].block_table[0]
        manager.deallocate(twins[reused])
        other = admit(manager, tokens(4, first=50))
        found = manager._find_prefix(make_seq(tokens(5)))
        assert [block.block_id for block in found] in ([], [kept_block])
        found = manager._find_prefix(make_seq([*tokens(4, first=50), 0]))
        assert [block.block_id for block in found] == other.block_table


def test_reusing_the_copy_that_is_not_findable_keeps_the_one_that_is() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    first, twin = make_seq(tokens(4)), make_seq(tokens(4))
    assert manager.allocate(first)
    assert manager.allocate(twin)
    manager.publish(first, 0, 4)
    manager.publish(twin, 0, 4)
    manager.deallocate(twin)
    admit(manager, [99])
    found = manager._find_prefix(make_seq(tokens(5)))
    assert [block.block_id for block in found] == first.block_table


# Growth


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 16])
def test_growth_needs_a_block_exactly_when_a_token_begins_one(
    block_size: int, num_prompt_tokens: int
) -> None:
    manager = BlockManager(64, block_size)
    seq = admit(manager, tokens(num_prompt_tokens))
    for position in range(num_prompt_tokens, num_prompt_tokens + 2 * block_size + 1):
        seq.num_unread_tokens += 1
        assert manager.needs_block(seq) == (position % block_size == 0)
        if manager.needs_block(seq):
            manager.append_block(seq)
        assert not manager.needs_block(seq)
        seq.append_token(position)
        assert len(seq.block_table) == position // block_size + 1 == manager.num_used_blocks


def test_a_growing_sequence_takes_no_block_of_another() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    seqs = [admit(manager, tokens(5)), admit(manager, tokens(5))]
    for token_id in range(100, 105):
        for seq in seqs:
            grow(manager, seq, token_id)
    assert set(seqs[0].block_table) & set(seqs[1].block_table) == {seqs[0].block_table[0]}


# Cost


def test_a_pool_of_millions_costs_nothing_until_it_is_used() -> None:
    tracemalloc.start()
    try:
        manager = BlockManager(50_000_000, BLOCK_SIZE)
        admit(manager, tokens(12))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manager.num_free_blocks == 50_000_000 - 3
    assert len(manager._blocks) == 3
    assert peak < 100_000


def test_reviving_a_block_does_not_search_the_free_ones() -> None:
    """Any entry of an OrderedDict is removed, and its first one popped, in constant time."""
    assert isinstance(BlockManager(8, BLOCK_SIZE)._freed, OrderedDict)
