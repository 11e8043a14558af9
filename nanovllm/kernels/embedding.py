"""The start of a decode step: token ids, positions and embeddings in one launch.

Twin: nanovllm.layers.embed_head.resolve_and_embed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import launch


@triton.jit
def _resolve_and_embed_kernel(
    sources, sampled, context_lens, weight, positions, out, SIZE: tl.constexpr,
    FIRST_ID: tl.constexpr, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK columns of a sequence's embedding."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = tl.load(sources + row).to(tl.int64)
    token = -1 - source
    if source >= 0:
        token = tl.load(sampled + source)
    if tl.program_id(1) == 0:
        position = tl.maximum(tl.load(context_lens + row), 1) - 1
        tl.store(positions + row, position.to(tl.int64))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    if FIRST_ID is not None:
        token -= FIRST_ID
        is_own = (token >= 0) & (token < NUM_IDS)
        values = tl.load(weight + token * SIZE + columns, mask=mask & is_own, other=0.0)
    else:
        values = tl.load(weight + token * SIZE + columns, mask=mask)
    tl.store(out + row.to(tl.int64) * SIZE + columns, values, mask=mask)


def resolve_and_embed(
    sources: Tensor,
    sampled: Tensor,
    context_lens: Tensor,
    weight: Tensor,
    first_id: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings and positions of the tokens that a decode step is fed.

    Args:
        sources: int32 [num_seqs]: a row of `sampled`, or -1 - token id where the id is known.
        sampled: int64, the ids that the step before has sampled.
        context_lens: int32 [num_seqs], 0 for padding.
        weight: [num_ids, hidden_size], contiguous.
        first_id: the token whose embedding is the weight's first row, where it is a part of all:
            those of other tokens are zeros. None: there are no others.

    Returns:
        [num_seqs, hidden_size] in weight's dtype (`out`, if given, which must be contiguous), and
        int64 [num_seqs], 0 for padding.
    """
    num_seqs, size = len(sources), weight.size(1)
    positions = torch.empty(num_seqs, dtype=torch.int64, device=weight.device)
    out = weight.new_empty(num_seqs, size) if out is None else out
    block = min(1024, triton.next_power_of_2(size))
    launch(
        _resolve_and_embed_kernel, (num_seqs, triton.cdiv(size, block)), weight,
        sources, sampled, context_lens, weight, positions, out, SIZE=size, FIRST_ID=first_id,
        NUM_IDS=len(weight), BLOCK=block,
    )  # fmt: skip
    return out, positions
