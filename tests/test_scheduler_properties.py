"""BlockManager and Scheduler under random operations, with a simulated KV pool and model.

The simulated model samples a token that depends on every token before it, so that the completion of
each request is known in advance, however it is scheduled. The simulated pool stores in each slot
the tokens whose K/V would lie there: a position's K/V depends on all tokens up to it, so that a
slot holds the whole history. Each step checks that every position it attends to holds its own.
"""

from collections import Counter
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import ClassVar, cast
from zlib import crc32

import pytest
from conftest import Tally
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus

MAX_MODEL_LEN = 20
NUM_IDS = 5
STOP = 4
GARBAGE = b"\xff"
WHAT_MUST_HAVE_HAPPENED = (
    "operations",
    "prefills",
    "chunks",
    "prefix hits",
    "decodes",
    "steps launched ahead",
    "late tokens dropped",
    "preemptions",
    "aborts",
    "steps broken off",
    "requests finished",
)

pytestmark = pytest.mark.slow

History = bytes
"""The token ids of positions 0..n-1, one byte each."""


def next_token(history: History) -> int:
    """What the simulated model samples after these tokens."""
    return crc32(history) % NUM_IDS


class BrokenOff(Exception):
    """What a planted fault raises."""


class Request:
    """A sequence and what must become of it."""

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.is_aborted = False
        params = seq.params
        history = bytes(seq.token_ids)
        max_tokens = min(params.max_tokens, MAX_MODEL_LEN - len(history))
        completion: list[int] = []
        self.finish_reason = "length"
        for _ in range(max_tokens):
            completion.append(next_token(history + bytes(completion)))
            if completion[-1] == STOP and not params.ignore_eos:
                self.finish_reason = "stop"
                break
        self.completion = completion
        # A step that was scheduled before a stop id was read goes on after it.
        self.truth = history + bytes(completion)
        while len(self.truth) < MAX_MODEL_LEN + 2:
            self.truth += bytes([next_token(self.truth)])

    @property
    def is_under_way(self) -> bool:
        return not self.seq.is_finished

    def max_num_steps(self, max_num_batched_tokens: int) -> int:
        """Each token but the last may cost a decode, a preemption and a prefill in chunks."""
        num_chunks = -(-MAX_MODEL_LEN // max_num_batched_tokens)
        return len(self.completion) * (1 + num_chunks) + num_chunks


class Simulation:
    """A scheduler, the pool and the model that it schedules for, and every check of its steps."""

    def __init__(
        self,
        block_size: int,
        num_spare_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        counts: Counter[str],
    ) -> None:
        self.block_size = block_size
        self.num_blocks = -(-MAX_MODEL_LEN // block_size) + num_spare_blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.counts = counts
        config = SimpleNamespace(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.scheduler = Scheduler(
            cast(Config, config), BlockManager(self.num_blocks, block_size), frozenset([STOP])
        )
        self.slots = [[GARBAGE] * block_size for _ in range(self.num_blocks)]
        self.requests: dict[int, Request] = {}  # all there ever were, in order of arrival
        self.in_flight: Batch | None = None
        self.just_admitted: set[int] = set()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_unfinished or self.in_flight is not None

    # Operations

    def add(self, prompt: list[int], max_tokens: int, ignore_eos: bool) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        request = Request(Sequence(prompt, params, MAX_MODEL_LEN))
        self.requests[request.seq.seq_id] = request
        self.scheduler.add(request.seq)
        self.counts["requests"] += 1

    def step(self) -> None:
        """A step of the plain loop: schedule, compute, read."""
        self.read_in_flight()
        batch = self.schedule()
        if batch is not None:
            self.launch(batch)
            self.in_flight = batch
            self.read_in_flight()

    def step_overlapped(self) -> None:
        """A turn of the overlapped loop: the next step is launched, then the last one is read."""
        batch = self.schedule()
        if batch is not None:
            self.launch(batch)
            self.counts["steps launched ahead"] += self.in_flight is not None
        self.read_in_flight()
        self.in_flight = batch

    def abort(self, request: Request) -> None:
        self.counts["aborts"] += request.is_under_way
        request.is_aborted |= request.is_under_way
        self.scheduler.abort(request.seq)

    def break_off(self, num_written: int, num_read: int) -> None:
        """A step fails halfway through its writes, or the reading of the one before it does."""
        batch = self.schedule()
        for item in batch.items if batch else []:
            for position in range(item.start, item.end)[:num_written]:
                self.slot(item.seq, position)[position % self.block_size] = GARBAGE
        publish, num_published = self.block_manager.publish, count()

        def publish_some(seq: Sequence, start: int, end: int) -> None:
            if next(num_published) == num_read:
                raise BrokenOff
            publish(seq, start, end)

        self.block_manager.publish = publish_some  # type: ignore[method-assign]
        with suppress(BrokenOff):
            self.read_in_flight()
        self.just_admitted = set()
        ended = self.scheduler.start_over([r.seq for r in self.requests.values() if r.is_under_way])
        for seq in ended:
            self.check_result(seq)
        self.counts["steps broken off"] += 1
        self.counts["ended in a step broken off"] += len(ended)

    def finish(self, overlapped: bool) -> None:
        """Everything comes to its end, in a bounded number of steps."""
        limit = 2 + sum(
            request.max_num_steps(self.max_num_batched_tokens)
            for request in self.requests.values()
            if request.is_under_way
        )
        # In the overlapped loop a preemption waits for a turn that only reads.
        for _ in range(2 * limit if overlapped else limit):
            if not self.has_work:
                break
            self.step_overlapped() if overlapped else self.step()
            self.check()
        assert not self.has_work, "the sequences do not come to an end"
        assert self.scheduler.block_manager.num_free_blocks == self.num_blocks

    # What happens in a step

    def schedule(self) -> Batch | None:
        running = [seq.seq_id for seq in self.scheduler.running]
        num_preemptions = self.scheduler.num_preemptions
        in_flight = self.in_flight is not None
        batch = self.scheduler.schedule(in_flight)
        preempted = set(running) - {seq.seq_id for seq in self.scheduler.running}
        assert self.scheduler.num_preemptions == num_preemptions + len(preempted)
        assert preempted == set(running[len(running) - len(preempted) :]), "not the youngest"
        assert not (in_flight and preempted), "preempted with its ids unread"
        assert not preempted & self.just_admitted, "admitted only to be preempted"
        self.counts["preemptions"] += len(preempted)
        if batch is not None:
            self.counts["prefills" if batch.is_prefill else "decodes"] += 1
            is_prefill = batch.is_prefill
            self.just_admitted = {i.seq.seq_id for i in batch.items if is_prefill and i.samples}
            self.check_batch(batch)
        else:
            assert in_flight or not self.scheduler.has_unfinished, "stuck"
        return batch

    def check_batch(self, batch: Batch) -> None:
        assert batch.items
        ids = [item.seq.seq_id for item in batch.items]
        in_turn = sorted(set(ids))
        if not batch.is_prefill:  # among sequences of one length too
            ends = {item.seq.seq_id: item.end for item in batch.items}
            in_turn.sort(key=lambda seq_id: -ends[seq_id])
        assert ids == in_turn, "first come, first served; the longest first in a decode"
        if batch.is_prefill:
            assert batch.num_tokens <= self.max_num_batched_tokens
            assert all(item.samples for item in batch.items[:-1])
        for item in batch.items:
            assert 0 <= item.start < item.end <= len(item.seq)
            assert not item.seq.is_finished
            if not batch.is_prefill:
                assert item.samples
                assert item.end - item.start == 1
                assert len(item.seq.block_table) == -(-item.end // self.block_size)
            self.counts["chunks"] += not item.samples
            is_first = batch.is_prefill and 0 < item.start == item.seq.num_cached_tokens
            self.counts["prefix hits"] += is_first

    def slot(self, seq: Sequence, position: int) -> list[History]:
        return self.slots[seq.block_table[position // self.block_size]]

    def launch(self, batch: Batch) -> None:
        """Store the K/V of the step's tokens, then attend to everything up to them."""
        for item in batch.items:
            truth = self.requests[item.seq.seq_id].truth
            for position in range(item.start, item.end):
                slot = self.slot(item.seq, position)
                slot[position % self.block_size] = truth[: position + 1]
        for item in batch.items:
            truth = self.requests[item.seq.seq_id].truth
            for position in range(item.end):
                held = self.slot(item.seq, position)[position % self.block_size]
                assert held == truth[: position + 1], f"{item.seq} at {position}: {held!r}"

    def read_in_flight(self) -> None:
        """Read what the step in flight sampled."""
        if self.in_flight is None:
            return
        batch, self.in_flight = self.in_flight, None
        sampling = [item for item in batch.items if item.samples]
        self.counts["late tokens dropped"] += sum(item.seq.is_finished for item in sampling)
        token_ids = [self.requests[item.seq.seq_id].truth[item.end] for item in sampling]
        for seq in self.scheduler.postprocess(batch, token_ids):
            self.check_result(seq)

    def check_result(self, seq: Sequence) -> None:
        request = self.requests[seq.seq_id]
        assert not request.is_aborted
        assert seq.is_finished
        assert seq.completion_token_ids == request.completion
        assert seq.finish_reason == request.finish_reason
        self.counts["requests finished"] += 1

    # Invariants

    def check(self) -> None:
        self.counts["operations"] += 1
        self.check_queues()
        self.check_blocks()
        self.check_known_blocks()

    def check_queues(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= self.scheduler.max_num_seqs
        assert all(seq.status is SequenceStatus.RUNNING for seq in running)
        assert all(seq.status is SequenceStatus.WAITING for seq in waiting)
        under_way = [request.seq for request in self.requests.values() if request.is_under_way]
        assert running + waiting == under_way, "lost, or out of order of arrival"
        for seq in running:
            assert self.block_manager.num_blocks_for(seq.num_computed_tokens) == len(
                seq.block_table
            )
            assert seq.num_unread_tokens == (self.in_flight is not None and self.samples(seq))
        for seq in waiting[1:]:
            assert not seq.block_table
        for seq in waiting:
            assert seq.num_unread_tokens == 0
            if not seq.block_table:
                assert seq.num_computed_tokens == 0
        for request in self.requests.values():
            known = request.seq.completion_token_ids
            assert known == request.completion[: len(known)]
            if request.seq.is_finished:
                assert not request.seq.block_table
                assert request.is_aborted or request.seq.finish_reason is not None

    def samples(self, seq: Sequence) -> bool:
        """True if the step in flight samples a token for the sequence."""
        items = self.in_flight.items if self.in_flight else []
        return any(item.seq is seq and item.samples for item in items)

    @property
    def block_manager(self) -> BlockManager:
        return self.scheduler.block_manager

    def check_blocks(self) -> None:
        manager = self.block_manager
        tables = Counter(
            block_id for request in self.requests.values() for block_id in request.seq.block_table
        )
        assert manager.num_free_blocks + manager.num_used_blocks == self.num_blocks
        assert manager.num_used_blocks == len(tables)
        for block in manager._blocks:
            assert block.ref_count == tables[block.block_id]
        assert {b.block_id for b in manager._blocks if not b.ref_count} == set(manager._freed)

    def check_known_blocks(self) -> None:
        """Every block that can be found holds what it is found by."""
        manager = self.block_manager
        for block_hash, block in manager._hash_to_block.items():
            assert block.block_hash == block_hash
            held = self.slots[block.block_id]
            history = held[-1]
            num_before = len(history) - self.block_size
            assert list(history[num_before:]) == block.token_ids
            assert num_before % self.block_size == 0
            assert held == [history[: num_before + 1 + i] for i in range(self.block_size)]
            scratch = Sequence(list(history), SamplingParams(), MAX_MODEL_LEN)
            assert manager._hash(scratch, num_before // self.block_size) == block_hash


tokens = st.integers(0, 1)


class SchedulerMachine(RuleBasedStateMachine):
    """Random operations on a Simulation; everything is checked after each of them."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(
        block_size=st.integers(1, 4),
        num_spare_blocks=st.integers(0, 12),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 24),
    )
    def start(
        self,
        block_size: int,
        num_spare_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.simulation = Simulation(
            block_size, num_spare_blocks, max_num_seqs, max_num_batched_tokens, self.counts
        )

    @rule(
        prompt=st.lists(tokens, min_size=1, max_size=MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, MAX_MODEL_LEN),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, ignore_eos: bool) -> None:
        self.simulation.add(prompt, max_tokens, ignore_eos)

    @precondition(lambda self: self.simulation.requests)
    @rule(
        data=st.data(),
        num_kept=st.integers(1, MAX_MODEL_LEN - 1),
        ending=st.lists(tokens, max_size=4),
        copies=st.integers(1, 3),
        ignore_eos=st.booleans(),
    )
    def add_like_an_earlier_one(
        self,
        data: st.DataObject,
        num_kept: int,
        ending: list[int],
        copies: int,
        ignore_eos: bool,
    ) -> None:
        """Prompts that begin as an earlier prompt and its completion do."""
        earlier = data.draw(st.sampled_from(list(self.simulation.requests.values())))
        prompt = [*earlier.truth[:num_kept], *ending][: MAX_MODEL_LEN - 1]
        for _ in range(copies):
            self.simulation.add(prompt, MAX_MODEL_LEN, ignore_eos)

    @precondition(lambda self: self.simulation.has_work)
    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.simulation.step()
            self.simulation.check()

    @precondition(lambda self: self.simulation.has_work)
    @rule(num_steps=st.integers(1, 8))
    def step_overlapped(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.simulation.step_overlapped()
            self.simulation.check()

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        under_way = [r for r in self.simulation.requests.values() if r.is_under_way]
        self.simulation.abort(
            data.draw(st.sampled_from(under_way or list(self.simulation.requests.values())))
        )

    @precondition(lambda self: self.simulation.has_work)
    @rule(num_written=st.integers(0, 3), num_read=st.integers(0, 3))
    def break_off(self, num_written: int, num_read: int) -> None:
        self.simulation.break_off(num_written, num_read)

    @precondition(lambda self: self.simulation.has_work)
    @rule(overlapped=st.booleans())
    def finish(self, overlapped: bool) -> None:
        self.simulation.finish(overlapped)

    @invariant()
    def everything_holds(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            event(f"preemptions: {min(self.simulation.scheduler.num_preemptions, 3)}")
            self.simulation.finish(overlapped=True)


def test_random_operations(tally: Tally) -> None:
    SchedulerMachine.counts.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=400,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
    for name, amount in SchedulerMachine.counts.items():
        tally.count(f"scheduler properties: {name}", amount)
    never_seen = [name for name in WHAT_MUST_HAVE_HAPPENED if not SchedulerMachine.counts[name]]
    assert not never_seen, "the operations are too tame to show anything"
