"""Triton kernels. Each has a PyTorch twin of the same signature in nanovllm/layers.

Import nothing from here at the top of another module: triton is missing on many machines. A layer
asks `launchable` and imports the kernel where it launches it.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def launchable(x: Tensor) -> bool:
    """True if the Triton kernels can work on this tensor: it is on CUDA and triton is installed."""
    return x.is_cuda and _has_triton()
