"""What a step gives: sampled ids and log-probabilities, on their way to the host."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.engine.scheduler import Batch


class TokenLogprobs(NamedTuple):
    """Log-probabilities of sampled tokens and of the likeliest ones, for the rows that ask.

    asked: the row, and how many likeliest it asks for. ids, values: int64 and float32
    [len(asked), 1 + the most asked for], the sampled token first.
    """

    asked: dict[int, int]
    ids: Tensor
    values: Tensor

    def by_row(self, num_rows: int) -> list[dict[int, float] | None]:
        """For each row token ids and their log-probabilities, in order; None if it did not ask."""
        logprobs: list[dict[int, float] | None] = [None] * num_rows
        rows = zip(self.asked.items(), self.ids.tolist(), self.values.tolist(), strict=True)
        for (row, num_likeliest), ids, values in rows:
            count = 1 + num_likeliest
            logprobs[row] = dict(zip(ids[:count], values[:count], strict=True))
        return logprobs


class Done(Protocol):
    """What tells that a step is done: a CUDA event, or more."""

    def synchronize(self) -> None:
        """Wait for it."""


class Launched(NamedTuple):
    """A step on its way: its tensors are on the host once `done` has come.

    ids: int64 [num_sampled]. token_logprobs: None if no item asks for any.
    """

    batch: Batch
    ids: Tensor
    done: Done | None
    token_logprobs: TokenLogprobs | None = None

    def token_ids(self) -> list[int]:
        """Wait for the step: the sampled id of each item that samples, in order."""
        if self.done is not None:
            self.done.synchronize()
        ids: list[int] = self.ids.tolist()
        return ids

    def logprobs(self) -> list[dict[int, float] | None] | None:
        """Likewise the log-probabilities by token id: the sampled one first, then the likeliest.

        None for an item that does not ask for them, and altogether if none does.
        """
        if self.token_logprobs is None:
            return None
        if self.done is not None:
            self.done.synchronize()
        return self.token_logprobs.by_row(len(self.ids))


class HostOutputs:
    """Memory for one step. Copies from a GPU are only started: wait before reading.

    Args:
        max_num_seqs: sequences in a step.
        max_logprobs: log-probabilities of each.
        pinned: so that no copy from a GPU waits.
    """

    def __init__(self, max_num_seqs: int, max_logprobs: int, pinned: bool) -> None:
        def memory(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)

        self.ids = memory(max_num_seqs, torch.int64)
        self.logprob_ids = memory(max_num_seqs * max_logprobs, torch.int64)
        self.logprobs = memory(max_num_seqs * max_logprobs, torch.float32)

    def copy_ids(self, sampled: Tensor) -> Tensor:
        """Copy of int64 [num_sampled]."""
        return self.ids[: len(sampled)].copy_(sampled, non_blocking=True)

    def copy_logprobs(self, asked: dict[int, int], ids: Tensor, values: Tensor) -> TokenLogprobs:
        """Copy of what layers.logprobs.token_logprobs gave for the rows in `asked`."""
        host_ids = self.logprob_ids[: ids.numel()].view(ids.shape)
        host_values = self.logprobs[: values.numel()].view(values.shape)
        host_ids.copy_(ids, non_blocking=True)
        host_values.copy_(values, non_blocking=True)
        return TokenLogprobs(asked, host_ids, host_values)
