"""How kernels are launched; and how many of them are compiled at a time, before they are needed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from nanovllm.kernels.device import has_pdl

# Triton finds out with every launch which compiled kernel its arguments ask for. Most of the time
# of a launch goes there, so what was found is kept, by all that it can depend on.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}
_loading = Lock()
# Within compiling_ahead, in its thread: what would have been launched.
_asked_for: ContextVar[list[Any] | None] = ContextVar("asked_for", default=None)


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the GPU where a tensor lies, if the grid is not empty.

    A kernel takes a constexpr PDL: whether it is launched as a programmatic dependent of the one
    before (see has_pdl).
    """
    if 0 in grid:
        return
    options["PDL"] = options["launch_pdl"] = has_pdl(on.device)
    with torch.cuda.device_of(on):
        if (asked_for := _asked_for.get()) is not None:
            asked_for.append(kernel.warmup(*args, grid=grid, **options))
            return
        key = (id(kernel), on.device.index, *map(_kind, args), *options.values())
        if key in _compiled:
            compiled, constants = _compiled[key]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
            return
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):  # not interpreted
            constants = [options[name] for name in kernel.arg_names[len(args) :]]
            _compiled[key] = compiled, constants


def _kind(argument: Any) -> Any:
    """What a compiled kernel can depend on.

    Of a tensor its type and alignment; of an integer likewise, and whether it is 1, since numbers
    of tokens must not each make a kind of their own; of anything else, its value.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if hasattr(argument, "block_shape"):  # a tensor descriptor, Triton's or Gluon's
        return argument.base.dtype, *argument.block_shape
    return argument


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within, `launch` launches nothing: on leaving, what it was asked for is compiled and loaded.

    What is computed within is garbage. The kernels are compiled in many threads: one by one, they
    would take most of the time of a first start. They are loaded one by one: triton 3.6 makes of
    each kind of arguments an extension module, all of one name, and what two threads load at once
    may become one another's.
    """

    def finish(kernel: CompiledKernel | triton.FutureKernel) -> CompiledKernel | None:
        if isinstance(kernel, triton.FutureKernel):
            try:
                kernel = kernel.result()
            except SystemError:  # of ast.parse in several threads, in CPython 3.11
                return None  # it is compiled when it is launched
        with suppress(Exception), torch.cuda.device(device):
            driver.active.launcher_cls(kernel.src, kernel.metadata)  # to disk; for triton 3.6
        return kernel

    with ThreadPoolExecutor() as pool:
        asked_for: list[Any] = []
        token = _asked_for.set(asked_for)
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
            with _loading, torch.cuda.device(device):
                finished = pool.map(finish, {id(kernel): kernel for kernel in asked_for}.values())
                for kernel in list(finished):
                    if kernel is not None:
                        _ = kernel.run  # makes the launcher and loads the binary
        finally:
            _asked_for.reset(token)
