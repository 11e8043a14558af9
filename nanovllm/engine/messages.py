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

    Whether it is a prefill and how many sequences it has; a row of numbers and one of floats for
    each, by its bits; all block tables; the known ids of the tokens to compute.
    """
    items = batch.items
    ids = [item.token_ids for item in items]
    tables = [item.seq.block_table for item in items]
    rows = [
        (
            item.seq.seq_id,
            item.seq.seed,
            item.start,
            item.end,
            item.samples,
            len(known),
            len(table),
            min(item.seq.params.top_k, LARGEST),
            NO_LOGPROBS if item.seq.params.logprobs is None else item.seq.params.logprobs,
        )
        for item, known, table in zip(items, ids, tables, strict=True)
    ]
    params = [item.seq.params for item in items]
    floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float64)
    parts = (
        np.array([batch.is_prefill, len(items)], dtype=np.int64),
        np.array(rows, dtype=np.int64).ravel(),
        floats.view(np.int64).ravel(),
        np.fromiter(chain.from_iterable(tables), dtype=np.int64),
        np.fromiter(chain.from_iterable(ids), dtype=np.int64),
    )
    return torch.from_numpy(np.concatenate(parts))


def unpack_step(message: Tensor) -> Batch:
    """The step that pack_step packed; of each sequence there is what the step needs."""
    numbers = message.numpy()
    is_prefill, num_items = numbers[:2].tolist()
    ends = [2, 2 + 9 * num_items, 2 + 12 * num_items]
    rows = numbers[ends[0] : ends[1]].reshape(num_items, 9).tolist()
    floats = numbers[ends[1] : ends[2]].view(np.float64).reshape(num_items, 3).tolist()
    rest = numbers[ends[2] :].tolist()
    borders = accumulate((row[6] for row in rows), initial=0)
    tables = [rest[start:end] for start, end in pairwise(borders)]
    borders = accumulate((row[5] for row in rows), initial=sum(map(len, tables)))
    ids = [rest[start:end] for start, end in pairwise(borders)]
    items = []
    for row, values, table, known in zip(rows, floats, tables, ids, strict=True):
        seq_id, seed, start, end, samples, _, _, top_k, num_logprobs = row
        seq = Sequence(known, _params(*values, top_k, num_logprobs), end, seed)
        seq.seq_id, seq.block_table = seq_id, table
        items.append(ScheduledSequence(seq, start, end, bool(samples), first=start))
    return Batch(bool(is_prefill), items)


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
