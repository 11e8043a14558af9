"""How kernels are launched; and how many of them are compiled at a time, before they are needed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from nanovllm.kernels.device import has_pdl

_asked_for: list[Any] | None = None  # within compiling_ahead: what would have been launched


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the GPU where a tensor lies, if the grid is not empty.

    A kernel takes a constexpr PDL: whether it is launched as a programmatic dependent of the one
    before (see has_pdl).
    """
    if 0 in grid:
        return
    pdl = has_pdl(on.device)
    with torch.cuda.device_of(on):
        if _asked_for is None:
            kernel[grid](*args, PDL=pdl, launch_pdl=pdl, **options)
        else:
            options |= {"PDL": pdl, "launch_pdl": pdl, "grid": grid}
            _asked_for.append(kernel.warmup(*args, **options))


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within, `launch` launches nothing: on leaving, what it was asked for is compiled and loaded.

    What is computed within is garbage. The kernels are compiled in many threads: one by one, they
    would take most of the time of a first start.
    """
    global _asked_for

    def load(kernel: CompiledKernel) -> None:
        with torch.cuda.device(device):
            _ = kernel.run  # builds the launcher and loads the binary

    with ThreadPoolExecutor() as pool:
        _asked_for = []
        try:
            with triton.AsyncCompileMode(pool):
                yield
            futures = {id(future): future for future in _asked_for}.values()
            list(pool.map(lambda future: load(future.result()), futures))
        finally:
            _asked_for = None
