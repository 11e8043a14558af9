"""What the kernels' launch choices depend on: properties of the GPU, asked once."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; an H100's where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def is_hopper(device: torch.device) -> bool:
    """True for sm_90 (H100, H200): what Gluon kernels need, and what choices were measured on."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def has_pdl(device: torch.device) -> bool:
    """True where programmatic dependent launch works: sm_90 and later.

    A kernel launched so starts while the one before it still runs. Every kernel here calls
    `gdc_wait` before it touches what others write or read, and `gdc_launch_dependents` only after
    that; so a kernel overlaps with one predecessor at most, and what an earlier one wrote (weights,
    block tables, context lengths) may be read before the wait.
    """
    if device.type != "cuda" or knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_tma(device: torch.device) -> bool:
    """True where a tile is loaded by its descriptor in one instruction: sm_90 and later.

    Elsewhere Triton makes loads of two bytes each of it. (The interpreter knows descriptors too.)
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_fp8(device: torch.device) -> bool:
    """True where there are instructions for FP8: sm_89 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def prefetch(pointers) -> None:
    """Ask for the cache lines (128 bytes) of pointers to be brought to L2.

    Allowed before `gdc_wait` even where the kernel before still writes: L2 is where writes meet.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
