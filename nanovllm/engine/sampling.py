"""Sampler: from logits, of the vocabulary or a rank's part, to token ids and log-probabilities."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.kernels import kernel_of
from nanovllm.layers.filters import Filters, kept_threshold
from nanovllm.layers.logprobs import ROWS_AT_A_TIME, token_logprobs
from nanovllm.layers.sampler import ids_of, sample
from nanovllm.utils.parallel import RankGroup


class SamplingTensors(NamedTuple):
    """How each of a step's sequences samples, as `layers.sampler.sample` wants it.

    temperatures: float32; seeds, positions (of the tokens sampled from): int64; all [num_sampled].
    filters: None if no sequence has any.
    """

    temperatures: Tensor
    seeds: Tensor
    positions: Tensor
    filters: Filters | None


class Sampler:
    """Holds a step's logits and what was sampled from them.

    They have one place for all graphs, so that what a replay has left there can be read.
    logits: [max_num_seqs, vocab_size] in the model's dtype. sampled: int64 [max_num_seqs].

    Where ranks share the vocabulary, each finds the best token of its part, and they tell one
    another. Only for rows with filters or log-probabilities are logits gathered: afterwards, since
    what a graph does cannot depend on its rows.

    Args:
        max_num_seqs: rows.
        vocab_size: of this rank's part.
        group: of the ranks that share it.
        device, dtype: of the logits.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        group: RankGroup,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.group = group
        self.first_id = group.rank * vocab_size if group.size > 1 else None
        self.sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.logits = torch.empty(max_num_seqs, vocab_size, dtype=dtype, device=device)
        self._kept_threshold = kernel_of(kept_threshold, "filters", device)
        self._sample = kernel_of(sample, "sampler", device, row_size=0)
        if kernels.usable(device):
            from nanovllm.kernels.sampler import sample_workspace

            with_workspace: Any = self._sample
            workspace = sample_workspace(max_num_seqs, device)
            self._sample = partial(with_workspace, workspace=workspace)

    def sample(self, logits: Tensor, how: SamplingTensors) -> None:
        """Fill `sampled` from logits [num_sampled, vocab_size]; of a rank's part: unfiltered."""
        out = self.sampled[: len(logits)]
        if self.first_id is None:
            self._sample_whole(logits, how, out)
        else:
            keys = self.group.keys_output(len(logits))
            keys = self._sample(logits, *how[:3], out=keys, first_id=self.first_id)
            ids_of(self.group.all_reduce_max(keys), out=out)

    def sample_filtered(self, rows: Tensor, how: SamplingTensors) -> None:
        """Where ranks share the vocabulary: sample rows, int64 [n], again, with their filters."""
        for part, chosen in enumerate(rows.split(ROWS_AT_A_TIME)):
            some = slice(part * ROWS_AT_A_TIME, part * ROWS_AT_A_TIME + len(chosen))
            filters = how.filters and Filters(*(values[some] for values in how.filters))
            temperatures, seeds, positions = (values[some] for values in how[:3])
            of_those = SamplingTensors(temperatures, seeds, positions, filters)
            logits = self.group.all_gather(self.logits[chosen])
            self.sampled[chosen] = self._sample_whole(logits, of_those)

    def logprobs(self, rows: Tensor, num_likeliest: int) -> tuple[Tensor, Tensor]:
        """What layers.logprobs.token_logprobs gives for rows, int64 [n], of the last step."""
        if self.first_id is None:
            return token_logprobs(self.logits, self.sampled, rows, num_likeliest)
        found = []
        for chosen in rows.split(ROWS_AT_A_TIME):
            logits = self.group.all_gather(self.logits[chosen])
            numbers = torch.arange(len(chosen), device=rows.device)
            found.append(token_logprobs(logits, self.sampled[chosen], numbers, num_likeliest))
        ids, values = zip(*found, strict=True)
        return torch.cat(ids), torch.cat(values)

    def _sample_whole(
        self, logits: Tensor, how: SamplingTensors, out: Tensor | None = None
    ) -> Tensor:
        thresholds = None
        if how.filters is not None:
            thresholds = self._kept_threshold(logits, how.temperatures, *how.filters)
        return self._sample(logits, *how[:3], thresholds, out=out)
