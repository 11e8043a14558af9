"""From logits to token ids."""

import torch
from torch import Tensor


def sample(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Draw one id a row from softmax(logits / temperature); the likeliest where temperature is 0.

    An exponential race: with E_i ~ Exp(1), argmax_i p_i / E_i is distributed as p, and so is
    argmax_i (log p_i - log E_i), which needs no softmax.

    Args:
        logits: [num_seqs, vocab_size], any float dtype.
        temperatures: float32 [num_seqs], >= 0.

    Returns:
        int64 [num_seqs].
    """
    greedy = logits.argmax(dim=-1)
    # Differences to the maximum: a tiny temperature then gives -inf, never inf - inf.
    scores = logits.float() - logits.gather(1, greedy[:, None]).float()
    scores.div_(temperatures.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    noise = torch.empty_like(scores).exponential_().clamp_(min=torch.finfo(torch.float32).tiny)
    sampled = scores.sub_(noise.log_()).argmax(dim=-1)
    return torch.where(temperatures == 0, greedy, sampled)
