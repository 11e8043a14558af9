"""Scheduler: which sequences run in the next step, and what becomes of them after it."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step: its tokens start..end-1 are computed.

    `samples` is False for a chunk of a prompt that does not reach the end of the sequence: its
    logits are not needed. `first`: the place in the sequence of seq.token_ids[0], which is not 0
    where only a step's part of a sequence has been sent.
    """

    seq: Sequence
    start: int
    end: int
    samples: bool
    first: int = 0

    @property
    def token_ids(self) -> list[int]:
        """Those of the tokens whose ids are known: all, or none if it is still being sampled."""
        return self.seq.token_ids[self.start - self.first : self.end - self.first]


@dataclass(slots=True)
class Batch:
    """One step: either prefill (new tokens of waiting sequences) or decode (one token each).

    Items are in the order of arrival, in a decode the longest first.
    """

    is_prefill: bool
    items: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(item.end - item.start for item in self.items)


class Scheduler:
    """Owns the queues of sequences and decides step by step what is computed.

    `schedule` moves the sequences of a step forward as if it were done, leaving the tokens to be
    sampled unread; `postprocess` fills in the ids. Between the two, the next step may already be
    scheduled, so that the device need not wait for Python.

    Invariants: a waiting sequence holds no blocks, except the first one in the middle of a chunked
    prefill; a running sequence holds the blocks of all its computed tokens; at most
    `max_num_seqs` sequences hold blocks.

    Args:
        config: max_num_seqs, max_num_batched_tokens.
        block_manager: the KV pool; no smaller than what one sequence of max_model_len takes.
        stop_ids: the token ids that end a sequence unless it ignores them.
    """

    def __init__(
        self, config: Config, block_manager: BlockManager, stop_ids: frozenset[int]
    ) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.block_manager = block_manager
        self.stop_ids = stop_ids
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        # For statistics. Prompts are counted when their prefill begins.
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of the prompts: found in the prefix cache
        self.num_generated_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def schedule(self, in_flight: bool = False) -> Batch | None:
        """The next step, or None if there is nothing to compute.

        Args:
            in_flight: a step is scheduled whose ids have not been read. Then nothing is preempted,
                since a preempted sequence needs all its ids for its new prefill: where a block is
                missing the answer is None, and the caller reads that step first.
        """
        return self._schedule_prefill() or self._schedule_decode(in_flight)

    def _schedule_prefill(self) -> Batch | None:
        """Admit waiting sequences, first come first served, within the token and block budgets."""
        items: list[ScheduledSequence] = []
        budget = self.max_num_batched_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            # Room for every running sequence and this one to grow, so that no decode step soon
            # undoes the admission. Alone it needs none: the pool holds any one sequence.
            num_reserved = len(self.running) + 1 if self.running else 0
            if not seq.block_table:
                if not self.block_manager.allocate(seq, num_reserved):
                    break
                self._count_admission(seq)
            start = seq.num_computed_tokens
            end = min(len(seq), start + budget)
            budget -= end - start
            items.append(self._advance(seq, start, end))
            # A step stores its K/V before it attends: its own later sequences may share them too.
            self.block_manager.publish(seq, start, end)
            if not items[-1].samples:
                break
            seq.status = SequenceStatus.RUNNING
            self.running.append(self.waiting.popleft())
        return Batch(is_prefill=True, items=items) if items else None

    def _count_admission(self, seq: Sequence) -> None:
        if seq.num_completion_tokens == 0:  # not one that was preempted
            self.num_prompt_tokens += seq.num_prompt_tokens
            self.num_cached_tokens += seq.num_cached_tokens

    def _schedule_decode(self, in_flight: bool) -> Batch | None:
        """One more token for every running sequence that has not reached its length limit."""
        seqs = [seq for seq in self.running if not seq.is_at_length_limit]
        num_missing = sum(map(self.block_manager.needs_block, seqs))
        while num_missing > self.block_manager.num_free_blocks:
            if in_flight:
                return None
            youngest = seqs.pop()
            num_missing -= self.block_manager.needs_block(youngest)
            self._preempt(youngest)
        # Longest first: a GPU takes rows in this order, and what it ends with should be short.
        seqs.sort(key=len, reverse=True)
        items = []
        for seq in seqs:
            if self.block_manager.needs_block(seq):
                self.block_manager.append_block(seq)
            items.append(self._advance(seq, len(seq) - 1, len(seq)))
        return Batch(is_prefill=False, items=items) if items else None

    def _advance(self, seq: Sequence, start: int, end: int) -> ScheduledSequence:
        """Schedule tokens start..end-1, and a new one after them if they are the last."""
        item = ScheduledSequence(seq, start, end, samples=end == len(seq))
        seq.num_computed_tokens = end
        seq.num_unread_tokens += item.samples
        return item

    def _preempt(self, seq: Sequence) -> None:
        """Put a running sequence back to the front of the queue; its K/V is computed anew later."""
        self.running.remove(seq)
        self.block_manager.deallocate(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def postprocess(
        self,
        batch: Batch,
        token_ids: list[int],
        logprobs: list[dict[int, float] | None] | None = None,
    ) -> list[Sequence]:
        """Record what a step sampled.

        A sequence that ended meanwhile (a stop id seen one step late, or an abort) is passed over.

        Args:
            batch: the oldest step that was scheduled and not postprocessed.
            token_ids: the sampled id of each of its items that samples, in order.
            logprobs: log-probabilities for each likewise, None where they are not asked for; None
                if they are asked for nowhere.

        Returns:
            The sequences that this step finished, in the order of the batch.
        """
        finished = []
        sampling = [item for item in batch.items if item.samples]
        logprobs = [None] * len(sampling) if logprobs is None else logprobs
        for item, token_id, token_logprobs in zip(sampling, token_ids, logprobs, strict=True):
            seq = item.seq
            if seq.is_finished:
                continue
            self.num_generated_tokens += 1
            seq.append_token(token_id, token_logprobs)
            if not batch.is_prefill:  # a prefill's blocks were published when it was scheduled
                self.block_manager.publish(seq, item.start, item.end)
            if self._has_ended(seq):
                finished.append(seq)
        for seq in finished:
            self._release(seq)
        if finished:
            self.running = [seq for seq in self.running if not seq.is_finished]
        return finished

    def abort(self, seq: Sequence) -> None:
        """End a sequence in any state; a step in flight may still hold it and is not disturbed."""
        if seq.is_finished:
            return
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        self._release(seq)

    def start_over(self, seqs: list[Sequence]) -> list[Sequence]:
        """Recover from a step that broke off anywhere: all blocks free and unknown, `seqs` waiting.

        The sequences keep the tokens that are known; everything else is computed anew.

        Returns:
            Those of `seqs` that have ended already; they are not queued.
        """
        self.block_manager = BlockManager(
            self.block_manager.num_blocks, self.block_manager.block_size
        )
        ended = [seq for seq in seqs if self._has_ended(seq)]
        self.running = []
        self.waiting = deque(seq for seq in seqs if seq.finish_reason is None)
        for seq in seqs:
            is_ended = seq.finish_reason is not None
            seq.status = SequenceStatus.FINISHED if is_ended else SequenceStatus.WAITING
            seq.num_unread_tokens = seq.num_computed_tokens = 0
            seq.block_table = []
            if seq.logprobs is not None:
                del seq.logprobs[len(seq.completion_token_ids) :]
        return ended

    def _has_ended(self, seq: Sequence) -> bool:
        """Whether the known tokens end the sequence; sets its finish_reason and stop_reason."""
        if seq.num_known_completion_tokens == 0:
            return False
        finish_reason: str | None = None
        stop_reason: str | int | None = None
        last_id = seq.token_ids[-1]
        if last_id in self.stop_ids and not seq.params.ignore_eos:
            finish_reason = "stop"
        elif last_id in seq.stop_token_ids:
            finish_reason, stop_reason = "stop", last_id
        elif len(seq.token_ids) >= seq.max_num_tokens:
            finish_reason = "length"
        seq.is_ended_by_id = finish_reason == "stop"
        if seq.detokenizer is not None:
            is_final = finish_reason is not None
            try:
                stop_text = seq.detokenizer.update(seq.text_token_ids, is_final)
            except Exception as error:  # for whom the request is to hear of, not for who steps
                stop_text, seq.error, finish_reason = None, error, "stop"
            if stop_text is not None:
                finish_reason, stop_reason = "stop", stop_text
        seq.stop_reason, seq.finish_reason = stop_reason, finish_reason
        return finish_reason is not None

    def _release(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.FINISHED
        seq.num_unread_tokens = 0
        self.block_manager.deallocate(seq)
