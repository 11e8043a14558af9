"""BatchLayout: a scheduled batch as tensors, with where K/V goes and what is attended to.

Tokens of all sequences lie in one row; a `Context` says where each sequence's begin.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.decode_graphs import DecodeRow, StepTensors
from nanovllm.engine.sampling import SamplingTensors
from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.layers.filters import Filters
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.context import Context
from nanovllm.utils.device import to_device


def has_filters(params: SamplingParams) -> bool:
    """True if not every token may be sampled."""
    return bool(params.top_k or params.top_p < 1 or params.min_p)


class BatchLayout:
    """Makes the tensors of a step from its scheduled sequences.

    It remembers one thing from step to step: in which row each sequence's sampled id will be.

    Args:
        block_size: token positions in a KV block.
        vocab_size: of the model.
        device: where the tensors are wanted.
    """

    def __init__(self, block_size: int, vocab_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self._sampled_rows: dict[int, int] = {}  # of the step launched last, by seq_id

    def remember_sampled(self, sampling: list[ScheduledSequence]) -> None:
        """Row i of what the step being launched samples is item i's: the next may refer to it."""
        self._sampled_rows = {item.seq.seq_id: row for row, item in enumerate(sampling)}

    def prefill(self, items: list[ScheduledSequence]) -> tuple[Tensor, Context]:
        """input_ids, int64 [num_tokens], and the layout of a prefill step."""
        input_ids = [np.array(item.token_ids) for item in items]
        positions = [np.arange(item.start, item.end) for item in items]
        query_lens = [item.end - item.start for item in items]
        key_lens = [item.end for item in items]
        slots = np.concatenate([self._slots(item) for item in items])
        context = self._prefill_context(query_lens, key_lens, slots)
        context.positions = self._tensor(np.concatenate(positions), torch.int64)
        if query_lens != key_lens:
            context.block_tables = self._block_tables(items)
        last_rows = [end - 1 for end in accumulate(query_lens)]
        rows = [row for row, item in zip(last_rows, items, strict=True) if item.samples]
        context.logit_rows = self._tensor(rows, torch.int64)
        return self._tensor(np.concatenate(input_ids), torch.int64), context

    def empty_prefill(
        self, lengths: list[int], key_lens: list[int] | None = None
    ) -> tuple[Tensor, Context]:
        """`prefill` of zeros that stores nothing; with key_lens, it attends to the first block."""
        context = self._prefill_context(lengths, key_lens or lengths, np.full(sum(lengths), -1))
        if key_lens is not None:
            width = -(-max(key_lens) // self.block_size)
            context.block_tables = self._tensor([[0] * width] * len(lengths), torch.int32)
        context.positions = self._tensor([0] * sum(lengths), torch.int64)
        context.logit_rows = context.positions[: len(lengths)]
        return context.positions, context

    def decode(self, items: list[ScheduledSequence]) -> tuple[StepTensors, list[int]]:
        """The inputs of a decode step, and its context_lens on the host."""
        rows = self.decode_rows(items)
        inputs = StepTensors(
            sources=self._tensor([row.source for row in rows], torch.int32),
            slot_mapping=self._tensor([row.slot for row in rows], torch.int32),
            context_lens=self._tensor([row.context_len for row in rows], torch.int32),
            block_tables=self._block_tables(items),
            temperatures=self._tensor([row.temperature for row in rows], torch.float32),
            seeds=self._tensor([row.seed for row in rows], torch.int64),
            filters=self._filters(items),
        )
        return inputs, [row.context_len for row in rows]

    def decode_rows(self, items: list[ScheduledSequence]) -> list[DecodeRow]:
        """A decode step's inputs as host numbers, for DecodeGraphs.launch."""
        return [self._decode_row(item) for item in items]

    def sampling(self, items: list[ScheduledSequence]) -> SamplingTensors:
        """How sequences that a step samples for do it."""
        return SamplingTensors(
            self._tensor([item.seq.params.temperature for item in items], torch.float32),
            self._tensor([item.seq.seed for item in items], torch.int64),
            self._tensor([item.end - 1 for item in items], torch.int64),
            self._filters(items),
        )

    def _decode_row(self, item: ScheduledSequence) -> DecodeRow:
        seq = item.seq
        known = item.token_ids
        source = -1 - known[0] if known else self._sampled_rows[seq.seq_id]
        return DecodeRow(
            source,
            self._slot(item),
            item.end,
            seq.block_table,
            seq.params.temperature,
            seq.seed,
            self._top_k(seq.params),
            seq.params.top_p,
            seq.params.min_p,
        )

    def _filters(self, items: list[ScheduledSequence]) -> Filters | None:
        """What each item keeps to sample from; None if all keep everything."""
        params = [item.seq.params for item in items]
        if not any(map(has_filters, params)):
            return None
        return Filters(
            self._tensor([self._top_k(p) for p in params], torch.int32),
            self._tensor([p.top_p for p in params], torch.float32),
            self._tensor([p.min_p for p in params], torch.float32),
        )

    def _top_k(self, params: SamplingParams) -> int:
        """As a number that fits in int32; 0 if it keeps all."""
        return params.top_k if params.top_k < self.vocab_size else 0

    def _prefill_context(
        self, query_lens: list[int], key_lens: list[int], slots: np.ndarray
    ) -> Context:
        return Context(
            is_prefill=True,
            slot_mapping=self._tensor(slots, torch.int32),
            query_lens=query_lens,
            key_lens=key_lens,
            block_size=self.block_size,
            cu_seqlens_q=self._tensor([0, *accumulate(query_lens)], torch.int32),
            cu_seqlens_k=self._tensor([0, *accumulate(key_lens)], torch.int32),
        )

    def _slot(self, item: ScheduledSequence) -> int:
        """The slot of a decoded token: it stands at position `start`."""
        block, offset = divmod(item.start, self.block_size)
        return item.seq.block_table[block] * self.block_size + offset

    def _slots(self, item: ScheduledSequence) -> np.ndarray:
        """The slots of positions start .. end - 1."""
        positions = np.arange(item.start, item.end)
        blocks = np.array(item.seq.block_table)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def _block_tables(self, items: list[ScheduledSequence]) -> Tensor:
        """int32 [num_seqs, longest table], padded with -1."""
        tables = [item.seq.block_table for item in items]
        width = max(map(len, tables))
        return self._tensor([table + [-1] * (width - len(table)) for table in tables], torch.int32)

    def _tensor(self, values: list[Any] | np.ndarray, dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self.device)


def dry_prefills(
    sizes: Iterable[int], max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
) -> list[list[int]]:
    """Lengths of the prompts of prefill steps of so many tokens, for BatchLayout.empty_prefill.

    The prompts are as long as may be; sizes too large for a step are cut to the largest. The
    largest step comes first: its kernels take the longest to compile.
    """
    steps = []
    most = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    for num_tokens in sorted({min(size, most) for size in sizes}, reverse=True):
        num_whole, rest = divmod(num_tokens, max_model_len)
        steps.append([max_model_len] * num_whole + [rest] * (rest > 0))
    return steps
