"""Scheduler: which sequences run in the next step, and what becomes of them after it."""

import random
from collections.abc import Iterable
from itertools import count
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus

BLOCK_SIZE = 4
STOP = 9
_unused_ids = count(1000, 1000)


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = BLOCK_SIZE,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
) -> Scheduler:
    config = SimpleNamespace(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )
    manager = BlockManager(num_blocks, block_size)
    return Scheduler(cast(Config, config), manager, frozenset([STOP]))


def add(
    scheduler: Scheduler,
    prompt: int | list[int],
    max_tokens: int = 100,
    ignore_eos: bool = False,
    max_total_tokens: int = 1000,
) -> Sequence:
    """Queue a prompt; a number stands for that many ids that no other prompt shares."""
    if isinstance(prompt, int):
        first = next(_unused_ids)
        prompt = list(range(first, first + prompt))
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    seq = Sequence(prompt, params, max_total_tokens)
    scheduler.add(seq)
    return seq


def must_schedule(scheduler: Scheduler, in_flight: bool = False) -> Batch:
    batch = scheduler.schedule(in_flight)
    assert batch is not None
    return batch


def read(scheduler: Scheduler, batch: Batch, token: int = 0) -> list[Sequence]:
    """Postprocess a step that sampled `token` for each of its sequences."""
    return scheduler.postprocess(batch, [token] * sum(item.samples for item in batch.items))


def step(scheduler: Scheduler, token: int = 0) -> Batch:
    batch = must_schedule(scheduler)
    read(scheduler, batch, token)
    return batch


def finish(scheduler: Scheduler, token: int = 0) -> int:
    """Step until nothing is left, and give the number of steps."""
    num_steps = 0
    while scheduler.has_unfinished:
        step(scheduler, token)
        num_steps += 1
        assert num_steps < 10_000
    return num_steps


def spans(batch: Batch) -> list[tuple[Sequence, int, int, bool]]:
    return [(item.seq, item.start, item.end, item.samples) for item in batch.items]


def seqs_of(batch: Batch) -> list[Sequence]:
    return [item.seq for item in batch.items]


def is_pool_free(scheduler: Scheduler) -> bool:
    return scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks


def assert_queues(
    scheduler: Scheduler, running: Iterable[Sequence], waiting: Iterable[Sequence]
) -> None:
    assert scheduler.running == list(running)
    assert list(scheduler.waiting) == list(waiting)
    assert all(seq.status is SequenceStatus.RUNNING for seq in scheduler.running)
    assert all(seq.status is SequenceStatus.WAITING for seq in scheduler.waiting)


# Prefill


def test_without_sequences_there_is_nothing_to_compute() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_waiting_prompts_are_prefilled_together_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    first, second, third = add(scheduler, 5), add(scheduler, 3), add(scheduler, 8)
    batch = must_schedule(scheduler)
    assert batch.is_prefill
    assert spans(batch) == [(first, 0, 5, True), (second, 0, 3, True), (third, 0, 8, True)]
    assert batch.num_tokens == 16
    assert_queues(scheduler, [first, second, third], [])


def test_a_new_arrival_is_prefilled_before_the_next_decode() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, 5)
    step(scheduler)
    second = add(scheduler, 5)
    assert seqs_of(step(scheduler)) == [second]
    batch = step(scheduler)
    assert not batch.is_prefill
    assert seqs_of(batch) == [first, second]


def test_a_prompt_over_the_token_budget_goes_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq = add(scheduler, 15)
    assert spans(step(scheduler)) == [(seq, 0, 6, False)]
    assert seq.status is SequenceStatus.WAITING
    assert spans(step(scheduler)) == [(seq, 6, 12, False)]
    assert spans(step(scheduler)) == [(seq, 12, 15, True)]
    assert seq.status is SequenceStatus.RUNNING
    assert seq.completion_token_ids == [0]


def test_a_prompt_that_exactly_fills_the_budget_is_not_chunked() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq, other = add(scheduler, 6), add(scheduler, 6)
    assert spans(step(scheduler)) == [(seq, 0, 6, True)]
    assert spans(step(scheduler)) == [(other, 0, 6, True)]


def test_the_budget_left_over_starts_the_next_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    first, second, third = add(scheduler, 6), add(scheduler, 9), add(scheduler, 3)
    assert spans(step(scheduler)) == [(first, 0, 6, True), (second, 0, 4, False)]
    assert spans(step(scheduler)) == [(second, 4, 9, True), (third, 0, 3, True)]


def test_no_step_computes_more_than_max_num_batched_tokens() -> None:
    rng = random.Random(0)
    scheduler = make_scheduler(max_num_batched_tokens=7, max_num_seqs=3)
    prompts = [rng.randint(1, 30) for _ in range(20)]
    for num_tokens in prompts:
        add(scheduler, num_tokens, max_tokens=rng.randint(1, 5))
    num_prefilled = 0
    while scheduler.has_unfinished:
        batch = step(scheduler)
        assert 1 <= batch.num_tokens <= 7
        assert all(item.end > item.start for item in batch.items)
        num_prefilled += batch.num_tokens * batch.is_prefill
    assert num_prefilled == sum(prompts)


def test_never_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    seqs = [add(scheduler, 4, max_tokens=index + 2) for index in range(7)]
    assert seqs_of(step(scheduler)) == seqs[:3]
    while scheduler.has_unfinished:
        step(scheduler)
        assert len(scheduler.running) <= 3


def test_a_finished_sequence_makes_room_for_a_waiting_one() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 4, max_tokens=2)
    second = add(scheduler, 4)
    step(scheduler)
    assert not step(scheduler).is_prefill
    assert seqs_of(step(scheduler)) == [second]


def test_a_chunked_prompt_counts_as_one_of_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=6)
    first, second, third = add(scheduler, 4), add(scheduler, 20), add(scheduler, 2)
    batches = [step(scheduler) for _ in range(4)]
    assert [seqs_of(batch) for batch in batches] == [[first, second], [second], [second], [second]]
    assert_queues(scheduler, [first, second], [third])
    assert not third.block_table


def test_no_prompt_overtakes_one_that_does_not_fit_yet() -> None:
    scheduler = make_scheduler(num_blocks=8)
    first, large, small = add(scheduler, 20), add(scheduler, 20), add(scheduler, 1)
    assert seqs_of(step(scheduler)) == [first]
    assert not step(scheduler).is_prefill
    assert_queues(scheduler, [first], [large, small])


def test_decoding_goes_on_while_a_waiting_prompt_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=8)
    first = add(scheduler, 20, max_tokens=6)
    large = add(scheduler, 20)
    step(scheduler)
    assert [seqs_of(step(scheduler)) for _ in range(6)] == [[first]] * 5 + [[large]]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    add(scheduler, [1] * 10)
    step(scheduler)
    second = add(scheduler, [1] * 10)
    assert spans(step(scheduler)) == [(second, 8, 10, True)]
    assert second.num_cached_tokens == 8


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, [1] * 10), add(scheduler, [1] * 10)
    assert spans(step(scheduler)) == [(first, 0, 10, True), (second, 8, 10, True)]
    assert second.block_table[:2] == first.block_table[:2]


def test_cached_tokens_do_not_count_against_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, [1] * 10)
    step(scheduler)
    seqs = [add(scheduler, [1] * 10) for _ in range(5)]
    assert seqs_of(step(scheduler)) == seqs


def test_a_chunk_shares_only_the_blocks_it_has_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    add(scheduler, [1] * 12)
    must_schedule(scheduler)
    scheduler.abort(scheduler.waiting[0])
    again = add(scheduler, [1] * 12)
    assert spans(step(scheduler)) == [(again, 4, 10, False)]


# Admission


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(5, False), (6, True)])
def test_admission_leaves_a_block_for_every_running_sequence_and_itself(
    num_blocks: int, is_admitted: bool
) -> None:
    """Two running and the one to admit hold a block each, and each begins another one next."""
    scheduler = make_scheduler(num_blocks=num_blocks)
    first, second = add(scheduler, 4), add(scheduler, 4)
    step(scheduler)
    third = add(scheduler, 4)
    assert seqs_of(step(scheduler)) == ([third] if is_admitted else [first, second])
    step(scheduler)
    assert scheduler.num_preemptions == 0


def test_a_sequence_alone_is_admitted_without_a_reserve() -> None:
    scheduler = make_scheduler(num_blocks=4)
    seq = add(scheduler, 16)
    assert seqs_of(step(scheduler)) == [seq]
    assert scheduler.block_manager.num_free_blocks == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_step_after_an_admission_preempts_nothing(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=12, block_size=2, max_num_seqs=5)
    for _ in range(30):
        add(scheduler, rng.randint(1, 12), max_tokens=rng.randint(1, 12))
    was_prefill = False
    while scheduler.has_unfinished:
        before = scheduler.num_preemptions
        batch = step(scheduler)
        if was_prefill:
            assert scheduler.num_preemptions == before
        was_prefill = batch.is_prefill
    assert scheduler.num_preemptions > 0
    assert is_pool_free(scheduler)


# Decode


def test_decode_computes_one_token_of_every_running_sequence() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 5), add(scheduler, 3)
    step(scheduler)
    batch = must_schedule(scheduler)
    assert not batch.is_prefill
    assert spans(batch) == [(first, 5, 6, True), (second, 3, 4, True)]
    assert batch.num_tokens == 2


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 3, 4, 5, 7, 8, 9])
def test_the_decode_slot_across_block_boundaries(num_prompt_tokens: int) -> None:
    """A decoded token stands at position len - 1, in the last block of the table."""
    scheduler = make_scheduler()
    seq = add(scheduler, num_prompt_tokens)
    step(scheduler)
    slots = []
    for num_tokens in range(num_prompt_tokens + 1, num_prompt_tokens + 12):
        batch = must_schedule(scheduler)
        (item,) = batch.items
        assert (item.start, item.end) == (num_tokens - 1, num_tokens)
        block, offset = divmod(item.start, BLOCK_SIZE)
        assert block == len(seq.block_table) - 1
        assert offset == (num_tokens - 1) % BLOCK_SIZE
        slots.append(seq.block_table[block] * BLOCK_SIZE + offset)
        read(scheduler, batch)
    assert len(set(slots)) == len(slots)


def test_a_decode_step_takes_blocks_only_for_the_tokens_that_begin_one() -> None:
    scheduler = make_scheduler()
    seqs = [add(scheduler, num_tokens) for num_tokens in (3, 4, 5)]
    step(scheduler)
    before = [len(seq.block_table) for seq in seqs]
    step(scheduler)
    assert [len(seq.block_table) for seq in seqs] == [before[0], before[1] + 1, before[2]]


def test_a_block_filled_by_decoding_is_shared_with_later_prompts() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, [1] * 6)
    for _ in range(4):
        step(scheduler)
    other = add(scheduler, [1] * 6 + [0] * 3)
    assert spans(step(scheduler)) == [(other, 8, 9, True)]
    assert other.block_table[:2] == seq.block_table[:2]


# Preemption


def test_the_youngest_sequence_is_preempted_when_a_block_is_missing() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old, young = add(scheduler, 7), add(scheduler, 7)
    later = add(scheduler, 7)
    while not scheduler.num_preemptions:
        batch = step(scheduler)
    assert seqs_of(batch) == [old]
    assert_queues(scheduler, [old], [young, later])
    assert young.block_table == []
    assert young.num_computed_tokens == 0


def test_a_preempted_sequence_keeps_its_tokens_and_computes_them_again() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old = add(scheduler, [1] * 7, max_tokens=9)
    young = add(scheduler, [2] * 7)
    token = 10
    while not scheduler.num_preemptions:
        step(scheduler, token := token + 1)
    kept = young.completion_token_ids
    assert kept == list(range(11, token))
    while young.status is SequenceStatus.WAITING:
        batch = step(scheduler, token := token + 1)
    assert old.is_finished
    (item,) = batch.items
    assert batch.is_prefill
    assert item.end == 7 + len(kept)
    assert young.completion_token_ids == [*kept, token]


def test_several_preempted_sequences_wait_in_order_of_arrival() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=2)
    seqs = [add(scheduler, 2) for _ in range(3)]
    step(scheduler)
    while len(scheduler.running) == 3:
        step(scheduler)
    later = add(scheduler, 2)
    while len(scheduler.running) > 1:
        step(scheduler)
    assert_queues(scheduler, seqs[:1], [*seqs[1:], later])


def test_only_as_many_are_preempted_as_blocks_are_missing() -> None:
    """All five begin their third block: without the two youngest, which had two each, it fits."""
    scheduler = make_scheduler(num_blocks=10)
    seqs = [add(scheduler, 4) for _ in range(5)]
    num_preempted = []
    for _ in range(6):
        step(scheduler)
        num_preempted.append(scheduler.num_preemptions)
    assert num_preempted == [0, 0, 0, 0, 0, 2]
    assert_queues(scheduler, seqs[:3], seqs[3:])


def test_a_lone_sequence_uses_the_whole_pool_and_is_never_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4)
    seq = add(scheduler, 1, max_total_tokens=16)
    waiting = add(scheduler, 12, max_tokens=1)
    finished = [seq for _ in range(15) for seq in read(scheduler, must_schedule(scheduler))]
    assert finished == [seq]
    assert len(seq) == 16
    assert scheduler.num_preemptions == 0
    assert seqs_of(step(scheduler)) == [waiting]


def test_a_preempted_sequence_goes_on_before_newer_ones() -> None:
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, 7, max_tokens=8)
    young = add(scheduler, 7, max_tokens=8)
    while not scheduler.num_preemptions:
        step(scheduler)
    newer = add(scheduler, 1)
    order: list[Sequence] = []
    while len(order) < 2:
        batch = step(scheduler)
        order += [seq for seq in seqs_of(batch) if batch.is_prefill]
    assert order == [young, newer]


# Ending


def test_a_stop_id_ends_a_sequence_and_is_kept() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5)
    step(scheduler)
    assert read(scheduler, must_schedule(scheduler), STOP) == [seq]
    assert seq.is_finished
    assert seq.finish_reason == "stop"
    assert seq.completion_token_ids == [0, STOP]


def test_the_first_token_may_be_a_stop_id() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5)
    assert read(scheduler, must_schedule(scheduler), STOP) == [seq]
    assert (seq.finish_reason, seq.completion_token_ids) == ("stop", [STOP])


def test_a_stop_id_in_the_prompt_ends_nothing() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, [1, STOP])
    step(scheduler)
    assert not seq.is_finished


def test_ignore_eos_goes_on_after_a_stop_id() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5, max_tokens=4, ignore_eos=True)
    assert finish(scheduler, STOP) == 4
    assert seq.finish_reason == "length"
    assert seq.completion_token_ids == [STOP] * 4


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens_ends_a_sequence(max_tokens: int) -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5, max_tokens=max_tokens)
    assert finish(scheduler) == max_tokens
    assert seq.finish_reason == "length"
    assert seq.completion_token_ids == [0] * max_tokens


@pytest.mark.parametrize("num_prompt_tokens", [1, 10, 15])
def test_max_model_len_ends_a_sequence(num_prompt_tokens: int) -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, num_prompt_tokens, max_total_tokens=16)
    finish(scheduler)
    assert seq.finish_reason == "length"
    assert len(seq) == 16


def test_a_stop_id_at_the_length_limit_counts_as_a_stop() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5, max_tokens=1)
    step(scheduler, STOP)
    assert seq.finish_reason == "stop"


def test_finished_sequences_are_given_in_order_and_leave_nothing_behind() -> None:
    scheduler = make_scheduler()
    first, second, third = (add(scheduler, 5, max_tokens=max_tokens) for max_tokens in (2, 3, 2))
    step(scheduler)
    assert read(scheduler, must_schedule(scheduler)) == [first, third]
    assert first.block_table == third.block_table == []
    assert_queues(scheduler, [second], [])
    assert read(scheduler, must_schedule(scheduler)) == [second]
    assert not scheduler.has_unfinished
    assert is_pool_free(scheduler)


def test_each_sampled_id_goes_to_its_own_sequence() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    seqs = [add(scheduler, 3), add(scheduler, 4), add(scheduler, 9)]
    batch = must_schedule(scheduler)
    assert [item.samples for item in batch.items] == [True, True, False]
    scheduler.postprocess(batch, [100, 200])
    assert [seq.completion_token_ids for seq in seqs] == [[100], [200], []]
    scheduler.postprocess(must_schedule(scheduler), [300])
    batch = must_schedule(scheduler)
    assert [item.seq for item in batch.items] == seqs[::-1]  # the longest first
    scheduler.postprocess(batch, [301, 201, 101])
    assert [seq.completion_token_ids for seq in seqs] == [[100, 101], [200, 201], [300, 301]]


def test_a_wrong_number_of_ids_is_an_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, 5)
    batch = must_schedule(scheduler)
    with pytest.raises(ValueError, match="zip"):
        scheduler.postprocess(batch, [0, 0])


# Abort


def test_abort_while_waiting() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    first, second, third = add(scheduler, 5), add(scheduler, 5), add(scheduler, 5)
    step(scheduler)
    scheduler.abort(second)
    assert second.is_finished
    assert second.finish_reason is None
    assert_queues(scheduler, [first], [third])


def test_abort_between_the_chunks_of_a_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    first, second = add(scheduler, 15), add(scheduler, 3)
    step(scheduler)
    scheduler.abort(first)
    assert is_pool_free(scheduler)
    assert seqs_of(step(scheduler)) == [second]


def test_abort_while_running() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 5), add(scheduler, 5)
    step(scheduler)
    scheduler.abort(first)
    assert_queues(scheduler, [second], [])
    assert scheduler.block_manager.num_used_blocks == len(second.block_table)
    assert seqs_of(step(scheduler)) == [second]


def test_abort_after_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old, young = add(scheduler, 7), add(scheduler, 7)
    while not scheduler.num_preemptions:
        step(scheduler)
    scheduler.abort(young)
    assert_queues(scheduler, [old], [])


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abort_with_a_step_in_flight_drops_what_it_sampled(num_steps: int) -> None:
    """The step is a chunk of the prompt, the rest of it, or a decode."""
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq = add(scheduler, 8)
    for _ in range(num_steps):
        step(scheduler)
    batch = must_schedule(scheduler)
    completion = seq.completion_token_ids
    scheduler.abort(seq)
    assert is_pool_free(scheduler)
    assert not scheduler.has_unfinished
    assert read(scheduler, batch) == []
    assert seq.completion_token_ids == completion
    assert is_pool_free(scheduler)


def test_abort_of_one_in_flight_leaves_the_others_their_ids() -> None:
    scheduler = make_scheduler()
    seqs = [add(scheduler, 5) for _ in range(3)]
    batch = must_schedule(scheduler)
    scheduler.abort(seqs[1])
    scheduler.postprocess(batch, [10, 20, 30])
    assert [seq.completion_token_ids for seq in seqs] == [[10], [], [30]]


def test_abort_of_a_finished_sequence_changes_nothing() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5, max_tokens=1)
    other = add(scheduler, [1] * 9)
    step(scheduler)
    scheduler.abort(seq)
    scheduler.abort(seq)
    assert seq.finish_reason == "length"
    assert_queues(scheduler, [other], [])
    assert scheduler.block_manager.num_used_blocks == 3


# Overlapped steps: step N+1 is scheduled before the ids of step N are read


def test_the_next_step_is_scheduled_before_the_last_ones_ids_are_known() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 6)
    first = must_schedule(scheduler)
    second = must_schedule(scheduler, in_flight=True)
    assert spans(second) == [(seq, 6, 7, True)]
    assert seq.num_unread_tokens == 2
    scheduler.postprocess(first, [10])
    third = must_schedule(scheduler, in_flight=True)
    assert spans(third) == [(seq, 7, 8, True)]
    scheduler.postprocess(second, [11])
    scheduler.postprocess(third, [12])
    assert seq.completion_token_ids == [10, 11, 12]
    assert seq.num_unread_tokens == 0


def test_a_stop_seen_one_step_late_drops_the_extra_token() -> None:
    scheduler = make_scheduler()
    seq, other = add(scheduler, 5), add(scheduler, 5)
    step(scheduler)
    current = must_schedule(scheduler)
    following = must_schedule(scheduler, in_flight=True)
    assert scheduler.postprocess(current, [STOP, 1]) == [seq]
    assert scheduler.block_manager.num_used_blocks == len(other.block_table)
    assert scheduler.postprocess(following, [2, 3]) == []
    assert seq.completion_token_ids == [0, STOP]
    assert (seq.num_unread_tokens, seq.num_completion_tokens) == (0, 2)
    assert other.completion_token_ids == [0, 1, 3]


def test_blocks_of_a_late_stop_are_freed_once() -> None:
    """They already belong to another sequence when the extra token is read."""
    scheduler = make_scheduler(num_blocks=4)
    seq = add(scheduler, 7)
    step(scheduler)
    current = must_schedule(scheduler)
    following = must_schedule(scheduler, in_flight=True)  # begins a third block
    assert len(seq.block_table) == 3
    read(scheduler, current, STOP)
    assert is_pool_free(scheduler)
    newer = add(scheduler, 16)
    batch = must_schedule(scheduler, in_flight=True)
    assert seqs_of(batch) == [newer]
    read(scheduler, following, STOP)
    assert scheduler.block_manager.num_free_blocks == 0
    assert read(scheduler, batch, STOP) == [newer]
    assert is_pool_free(scheduler)


def test_the_length_limit_is_known_ahead() -> None:
    scheduler = make_scheduler()
    short, long = add(scheduler, 5, max_tokens=2), add(scheduler, 5, max_tokens=3)
    batches = [must_schedule(scheduler), must_schedule(scheduler, in_flight=True)]
    read(scheduler, batches[0])
    third = must_schedule(scheduler, in_flight=True)
    assert seqs_of(third) == [long]
    assert read(scheduler, batches[1]) == [short]
    assert scheduler.schedule(in_flight=True) is None
    assert read(scheduler, third) == [long]
    assert is_pool_free(scheduler)


def test_with_a_step_in_flight_nothing_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old, young = add(scheduler, 5), add(scheduler, 5)
    in_flight = must_schedule(scheduler)
    while following := scheduler.schedule(in_flight=True):
        read(scheduler, in_flight)
        in_flight = following
    state = (list(old.block_table), list(young.block_table), len(old), len(young))
    assert scheduler.schedule(in_flight=True) is None
    assert_queues(scheduler, [old, young], [])
    assert state == (old.block_table, young.block_table, len(old), len(young))
    read(scheduler, in_flight)
    assert scheduler.num_preemptions == 0
    assert seqs_of(must_schedule(scheduler)) == [old]
    assert scheduler.num_preemptions == 1


def test_a_waiting_prompt_is_prefilled_while_a_decode_is_in_flight() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, 5)
    step(scheduler)
    decode = must_schedule(scheduler)
    second = add(scheduler, 5)
    prefill = must_schedule(scheduler, in_flight=True)
    assert spans(prefill) == [(second, 0, 5, True)]
    scheduler.postprocess(decode, [10])
    scheduler.postprocess(prefill, [20])
    assert first.completion_token_ids == [0, 10]
    assert second.completion_token_ids == [20]


def test_the_chunks_of_a_prompt_may_overlap() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq = add(scheduler, 8)
    first = must_schedule(scheduler)
    second = must_schedule(scheduler, in_flight=True)
    assert spans(second) == [(seq, 6, 8, True)]
    assert scheduler.postprocess(first, []) == []
    scheduler.postprocess(second, [10])
    assert seq.completion_token_ids == [10]


def test_a_block_filled_by_decoding_is_shared_once_its_ids_are_read() -> None:
    scheduler = make_scheduler()
    add(scheduler, [1] * 7, ignore_eos=True)
    prefill = must_schedule(scheduler)
    decode = must_schedule(scheduler, in_flight=True)  # fills the second block
    before = add(scheduler, [1] * 7 + [0, 0])
    following = must_schedule(scheduler, in_flight=True)
    assert spans(following) == [(before, 4, 9, True)]
    for batch in (prefill, decode, following):
        read(scheduler, batch)
    after = add(scheduler, [1] * 7 + [0, 5])
    assert spans(step(scheduler)) == [(after, 8, 9, True)]


def test_the_extra_token_after_a_late_stop_is_never_shared() -> None:
    scheduler = make_scheduler()
    add(scheduler, [1] * 6)
    prefill = must_schedule(scheduler)
    decode = must_schedule(scheduler, in_flight=True)
    read(scheduler, prefill)
    extra = must_schedule(scheduler, in_flight=True)  # would fill the second block
    read(scheduler, decode, STOP)
    read(scheduler, extra)
    other = add(scheduler, [1] * 6 + [0, STOP, 0])
    assert spans(step(scheduler)) == [(other, 4, 9, True)]


# Starting over


def test_start_over_frees_everything_and_queues_the_sequences_it_is_given() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    running, chunked, waiting = add(scheduler, 5), add(scheduler, 20), add(scheduler, 3)
    step(scheduler)
    scheduler.start_over([running, chunked, waiting])
    assert is_pool_free(scheduler)
    assert_queues(scheduler, [], [running, chunked, waiting])
    assert running.completion_token_ids == [0]
    assert spans(step(scheduler)) == [(running, 0, 6, True), (chunked, 0, 6, False)]


def test_start_over_forgets_the_sequences_it_is_not_given() -> None:
    scheduler = make_scheduler()
    add(scheduler, 5)
    kept = add(scheduler, 5)
    must_schedule(scheduler)
    scheduler.start_over([kept])
    assert seqs_of(step(scheduler)) == [kept]


def test_start_over_drops_the_tokens_of_steps_in_flight() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5)
    must_schedule(scheduler)
    must_schedule(scheduler, in_flight=True)
    scheduler.start_over([seq])
    assert (len(seq), seq.num_unread_tokens, seq.num_computed_tokens) == (5, 0, 0)
    assert spans(step(scheduler, token=7)) == [(seq, 0, 5, True)]
    assert seq.completion_token_ids == [7]


def test_blocks_of_a_step_that_broke_off_are_never_found() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, [1] * 9)
    must_schedule(scheduler)
    scheduler.start_over([seq])
    assert spans(step(scheduler)) == [(seq, 0, 9, True)]


def test_start_over_keeps_the_size_of_the_pool() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=3)
    scheduler.start_over([])
    assert scheduler.block_manager.num_blocks == 5
    assert scheduler.block_manager.block_size == 3
    assert scheduler.schedule() is None


def test_start_over_gives_back_what_had_ended_when_the_step_broke_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their last tokens were read, but the reading of the step failed before it said so."""
    scheduler = make_scheduler()
    at_limit = add(scheduler, 5, max_tokens=2)
    stopped, going_on = add(scheduler, 5), add(scheduler, 5)
    step(scheduler)
    batch = must_schedule(scheduler)
    publish = Mock(side_effect=[None, None, RuntimeError])
    monkeypatch.setattr(scheduler.block_manager, "publish", publish)
    with pytest.raises(RuntimeError):
        scheduler.postprocess(batch, [1, STOP, 2])
    assert scheduler.start_over([at_limit, stopped, going_on]) == [at_limit, stopped]
    assert (at_limit.finish_reason, stopped.finish_reason) == ("length", "stop")
    assert at_limit.is_finished
    assert stopped.is_finished
    assert_queues(scheduler, [], [going_on])


def test_a_sequence_shows_how_far_it_is() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 5)
    read(scheduler, must_schedule(scheduler))
    shown = f"Sequence({seq.seq_id}, RUNNING, 5 prompt + 1 tokens, 5 computed)"
    assert repr(seq) == shown
