"""Which device and dtype an engine computes on, and how host numbers get there."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("nanovllm")


def resolve_device(name: str) -> torch.device:
    """The device that the option `device` asks for; a CUDA device with its index.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:  # an index that no number of GPUs reaches
        raise ValueError(f"device={name!r} is no device: {error}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}, but torch finds no CUDA GPU")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={name!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def resolve_dtype(
    requested: str, checkpoint: str, device: torch.device, is_int4: bool = False
) -> torch.dtype:
    """The dtype to compute in: the one asked for, or if "auto" the one that suits the device.

    Args:
        is_int4: the weights are, which any CPU multiplies fastest by bfloat16.
    """
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if requested != "auto":
        return dtypes[requested]
    if device.type == "cpu":
        if is_int4:
            logger.info("dtype bfloat16: int4 weights are multiplied fastest by it")
            return torch.bfloat16
        if checkpoint == "bfloat16" and multiplies_bfloat16():
            logger.info("dtype bfloat16: the checkpoint's, and this processor multiplies in it")
            return torch.bfloat16
        reason = ", and this processor does not multiply in it" if checkpoint == "bfloat16" else ""
        logger.info(f"dtype float32: the checkpoint's is {checkpoint}{reason}")
        return torch.float32
    if checkpoint == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return dtypes[checkpoint]


def uses_onednn() -> bool:
    """True if torch has oneDNN, and the caller has not turned it off."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def multiplies_bfloat16() -> bool:
    """True if this processor has instructions for products in bfloat16, and torch uses them."""
    if not uses_onednn():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # it can be told to use older instructions
        return False
    return _has_any("avx512_bf16", "amx_bf16", "bf16")


@cache
def has_matrix_unit() -> bool:
    """True if this processor multiplies whole tiles of bfloat16 (AMX), and torch says so."""
    return _has_any("amx_bf16")


def _has_any(*names: str) -> bool:
    """True if this processor has one of these, as torch calls them."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in names)


@contextmanager
def own_modes(device: torch.device, inference: bool) -> Iterator[None]:
    """Within, launches go to this device, whatever modes of torch the caller is in.

    Args:
        inference: True for a step. False where tensors are made that steps write to: those made in
            inference mode could not be written to outside of it.
    """
    with torch.inference_mode(inference), ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def to_device(values: list[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers on a device. To CUDA from pinned memory, so that no copy waits."""
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
