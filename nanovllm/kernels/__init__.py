"""Kernels in Triton, and two for Hopper in Gluon, its lower level.

Each names its PyTorch twin, or twins, in nanovllm/layers.

Import nothing from here at the top of another module: triton is missing on many machines. Layers
ask `usable` once, when a model is built, and import a kernel only then.
"""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(device: torch.device | None = None) -> bool:
    """True if the kernels run on a device (torch's default one if None): CUDA, with triton."""
    device = torch.get_default_device() if device is None else device
    return device.type == "cuda" and _has_triton()


def dry_prefills(
    max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
) -> list[list[int]]:
    """Lengths of the prompts of prefill steps that launch, together, what any step launches.

    Totals are rounded up to whole prompts.

    Kernels differ for up to 16, 64, 128, 192 and 256 tokens, more, and 2,048 or more (linear
    layers: small_linear_plan, gated_linear.min_tokens); for prompts over 1,024 (attention), and for
    4,096 or more tokens of long prompts (hopper_attention.is_faster). The output head's differ with
    the number of sequences: decode steps of 1 to 64 launch all of them.
    """
    steps = [[2], [17], [65], [129], [193], [257]]
    for num_tokens in (2048, 4096):
        most = min(num_tokens, max_num_batched_tokens, max_num_seqs * max_model_len)
        longest = min(most, max_model_len)
        steps.append([longest] * -(-most // longest))
    return steps
