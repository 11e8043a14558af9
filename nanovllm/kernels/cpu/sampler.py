"""From logits to token ids. Twin: nanovllm.layers.sampler."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.cpu.build import DTYPES, ROW_STEP, call, layout

SAMPLE = layout(
    pointer="logits temperatures thresholds seeds positions out",
    long="stride first_id",
    integer="num_rows vocab_size dtype",
)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    thresholds: Tensor | None = None,
    out: Tensor | None = None,
    first_id: int | None = None,
) -> Tensor:
    """Twin: nanovllm.layers.sampler.sample.

    Args:
        logits: [num_seqs, vocab_size], rows contiguous.
        temperatures, thresholds: float32 [num_seqs]. seeds, positions: int64 [num_seqs].
    """
    if logits.size(1) < ROW_STEP:  # less than a vector
        logits = F.pad(logits, (0, ROW_STEP - logits.size(1)), value=-torch.inf)
    num_seqs, vocab_size = logits.shape
    out = seeds.new_empty(num_seqs) if out is None else out
    assert logits.stride(1) == 1 and out.is_contiguous()
    assert temperatures.dtype == torch.float32 and seeds.dtype == positions.dtype == torch.int64
    rows = temperatures, thresholds, seeds, positions
    tensors = logits, *(None if x is None else x.contiguous() for x in rows), out
    sizes = logits.stride(0), -1 if first_id is None else first_id, num_seqs, vocab_size
    call("sample", SAMPLE, *tensors, *sizes, DTYPES[logits.dtype])
    return out
