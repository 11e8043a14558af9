"""Triton kernels. Each names its PyTorch twin, or twins, in nanovllm/layers.

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
