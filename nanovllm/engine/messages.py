"""What rank 0 tells the others: a step, and the like, as one packed array int64 [n]."""

import os
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

# Kinds of messages.
STEP, CHECK_WEIGHTS, LOAD_WEIGHTS, END = range(4)
NOTHING = torch.zeros(0, dtype=torch.int64, device="cpu")
NO_LOGPROBS = -1
LARGEST = 2**63 - 1


def pack_step(batch: Batch) -> Tensor:
    """What a ModelRunner needs to know of a step: int64 [n].

    Whether it is a prefill and how many sequences it has; columns of numbers and of floats, by
    their bits, for these; all block tables and the known ids of the tokens to compute.
    """
    seqs, starts, ends, samples, _ = zip(*batch.items, strict=True)
    ids = [item.token_ids for item in batch.items]
    tables = [seq.block_table for seq in seqs]
    params = [seq.params for seq in seqs]
    columns = (
        [seq.seq_id for seq in seqs],
        [seq.seed for seq in seqs],
        starts,
        ends,
        samples,
        list(map(len, ids)),
        list(map(len, tables)),
        [min(p.top_k, LARGEST) for p in params],
        [NO_LOGPROBS if p.logprobs is None else p.logprobs for p in params],
    )
    floats = [p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]
    parts = (
        np.array([batch.is_prefill, len(seqs)], dtype=np.int64),
        np.array(columns, dtype=np.int64).ravel(),
        np.array(floats, dtype=np.float64).view(np.int64).ravel(),
        _packed([*chain.from_iterable(tables), *chain.from_iterable(ids)]),
    )
    return torch.from_numpy(np.concatenate(parts))


def unpack_step(message: Tensor) -> Batch:
    """The step that pack_step packed; of each sequence there is what the step needs."""
    numbers = message.numpy()
    is_prefill, count = numbers[:2].tolist()
    columns, floats, rest = np.split(numbers[2:], (9 * count, 12 * count))
    *which, num_ids, num_blocks, top_ks, num_logprobs = columns.reshape(9, count).tolist()
    seq_ids, seeds, starts, ends, samples = which
    floats = floats.view(np.float64).reshape(3, count)
    params = map(_params, *floats.tolist(), top_ks, num_logprobs)
    small = rest.view(np.int32).tolist()
    borders = accumulate(num_blocks + num_ids, initial=0)
    parts = [small[start:end] for start, end in pairwise(borders)]
    seqs = map(_sequence, seq_ids, seeds, params, parts[:count], parts[count:])
    items = map(ScheduledSequence, seqs, starts, ends, map(bool, samples), starts)
    return Batch(bool(is_prefill), list(items))


def _packed(small: list[int]) -> np.ndarray:
    """Numbers of 32 bits, two in one of 64."""
    return np.array(small + [0] * (len(small) % 2), dtype=np.int32).view(np.int64)


def _sequence(
    seq_id: int, seed: int, params: SamplingParams, block_table: list[int], token_ids: list[int]
) -> Sequence:
    """No more than this: its constructor would take most of the time that a step's message does."""
    seq = Sequence.__new__(Sequence)
    seq.seq_id, seq.seed, seq.params = seq_id, seed, params
    seq.block_table, seq.token_ids = block_table, token_ids
    return seq


def pack_path(path: Path) -> Tensor:
    """A path as a message."""
    return torch.tensor(list(os.fsencode(path)), dtype=torch.int64, device="cpu")


def unpack_path(message: Tensor) -> Path:
    return Path(os.fsdecode(bytes(message.tolist())))


@lru_cache(maxsize=1024)
def _params(
    temperature: float, top_p: float, min_p: float, top_k: int, num_logprobs: int
) -> SamplingParams:
    logprobs = None if num_logprobs == NO_LOGPROBS else num_logprobs
    return SamplingParams(
        temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, logprobs=logprobs
    )
