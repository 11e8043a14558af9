"""Kernels in Triton, and two for Hopper in Gluon, its lower level; in cpu/ in C, for a CPU.

Each names its PyTorch twin, or twins, in nanovllm/layers.

Import none of the modules here at the top of another module: triton is missing on many machines.
Layers ask once, when a model is built, and import a kernel only then.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import torch

T = TypeVar("T")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """True if the kernels run on a device: CUDA, with triton."""
    return device.type == "cuda" and _has_triton()


def multiplies_fp8(device: torch.device) -> bool:
    """True if the kernels for FP8 weights run on a device: sm_89 and later."""
    if not usable(device):
        return False
    from nanovllm.kernels.device import has_fp8

    return has_fp8(device)


def usable_on_cpu(device: torch.device, row_size: int) -> bool:
    """True if the kernels in C run on a device, for rows of so many elements."""
    if device.type != "cpu":
        return False
    from nanovllm.kernels.cpu import build

    return row_size % build.ROW_STEP == 0 and build.library() is not None


def multiplies_int4(device: torch.device) -> bool:
    """True if the kernel for int4 weights runs on a device."""
    if not usable_on_cpu(device, 0):
        return False
    from nanovllm.kernels.cpu.int4 import has_int4

    return has_int4()


def kernel_of(twin: T, module: str, device: torch.device, row_size: int | None = None) -> T:
    """The kernel that does what a PyTorch function does, where kernels are usable; else that one.

    Args:
        twin: a function of nanovllm.layers; the kernel's launcher has its name and signature.
        module: of nanovllm.kernels, in which the launcher is.
        row_size: of a function that cpu/ has as well, elements of its rows; 0: any number.
    """
    if not usable(device):
        if row_size is None or not usable_on_cpu(device, row_size):
            return twin
        module = f"cpu.{module}"
    kernel: T = getattr(import_module(f"{__name__}.{module}"), twin.__name__)  # type: ignore[attr-defined]
    return kernel
