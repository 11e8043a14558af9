"""Log-probabilities of sampled tokens and of the likeliest ones."""

import torch
from torch import Tensor

# So many rows are worked on at a time: a large vocabulary's in float32 are tens of MiB.
ROWS_AT_A_TIME = 32


def token_logprobs(
    logits: Tensor, ids: Tensor, rows: Tensor, num_likeliest: int
) -> tuple[Tensor, Tensor]:
    """The natural logarithm of softmax(logits) at some tokens, computed in float32.

    Args:
        logits: [num_seqs, vocab_size], any float dtype.
        ids: int64 [num_seqs].
        rows: int64 [num_rows], at least one: those that are asked for.
        num_likeliest: how many more tokens a row, at most vocab_size.

    Returns:
        Token ids, int64 [num_rows, 1 + num_likeliest]: that of `ids`, then the likeliest, in
        order; and their log-probabilities, float32 of the same shape.
    """
    parts = [
        _token_logprobs(logits[part].float(), ids[part], num_likeliest)
        for part in rows.split(ROWS_AT_A_TIME)
    ]
    all_ids, values = zip(*parts, strict=True)
    return torch.cat(all_ids), torch.cat(values)


def _token_logprobs(logits: Tensor, ids: Tensor, num_likeliest: int) -> tuple[Tensor, Tensor]:
    likeliest = logits.topk(num_likeliest).indices
    ids = torch.cat((ids[:, None], likeliest), dim=1)
    return ids, logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
