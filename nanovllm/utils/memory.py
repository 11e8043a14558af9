"""How much memory there is for the KV pool, and what kind."""

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

GIB = 1 << 30
CPU_POOL_LIMIT = 4 * GIB
CGROUPS = Path("/sys/fs/cgroup")
# Left free on the GPU for what no allocator reports: the driver's own, kernels loaded later.
CUDA_MARGIN = GIB // 2
LARGE_PAGE = 2 << 20


def free_cpu_memory() -> int:
    """Bytes of main memory that can be had: without swapping, and within the container's limit."""
    return min([_free_system_memory(), *_cgroup_rooms()])


def _cgroup_rooms(proc: Path = Path("/proc/self/cgroup"), mounted: Path = CGROUPS) -> list[int]:
    """What each control group that this process is in, version 1 or 2, leaves it of its limit."""
    rooms = []
    try:
        lines = os.fsdecode(proc.read_bytes()).splitlines()
    except OSError:
        return []  # no Linux
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cached = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cached = mounted / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        directory = root / group.lstrip("/")
        # The limits of the groups around it count too. In a container the path may not be there.
        for place in (directory, *directory.parents):
            if place.is_relative_to(root):
                rooms += _room(place, limit, usage, cached)
    return rooms


def _room(place: Path, limit: str, usage: str, cached: str) -> list[int]:
    """The limit of one control group less what is used, but for files that can be dropped."""
    try:
        most = int((place / limit).read_bytes())
    except (OSError, ValueError):  # no such group, or "max"
        return []
    used = 0
    try:
        used = int((place / usage).read_bytes())
        stats = (place / "memory.stat").read_text(encoding="ascii").splitlines()
        used -= sum(int(line.split()[1]) for line in stats if line.split()[:1] == [cached])
    except (OSError, ValueError, IndexError):
        pass  # the limit counts all the same
    return [max(0, most - used)]


def return_freed_memory() -> None:
    """Give the system back what was freed, where glibc would keep it for the process."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def in_large_pages(x: Tensor) -> Tensor:
    """A contiguous copy on the CPU; a large one in pages of megabytes, where the system has them.

    A processor looks up each page that it reads: of a weight in them it reads a tenth more a
    second. What lies in a page that other memory shares is not in a large one.
    """
    copy = torch.empty(0, dtype=x.dtype, device="cpu")
    if x.nbytes >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        return_freed_memory()  # of earlier weights: it is not where this one will be
        with suppress(OSError):  # a kernel without them
            pages = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            copy = torch.frombuffer(pages, dtype=x.dtype)
    return copy.resize_(x.shape).copy_(x)


@contextmanager
def memory_for(what: str, advice: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Say what to do where main memory, or at start-up a GPU's, runs out within.

    Raises:
        kind: "no memory for {what}: {advice}".
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Not every error that speaks of memory: "an illegal memory access" is another one.
        on_cuda = isinstance(error, torch.OutOfMemoryError)
        on_cpu = isinstance(error, MemoryError) or "allocate memory" in str(error)
        if not (on_cpu or (on_cuda and kind is not MemoryError)):
            raise
        raise kind(f"no memory for {what}: {advice}") from error


def _free_system_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * CPU_POOL_LIMIT


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept  # torch's allocator has it to give
    return free_cpu_memory()


def require_memory(option: str, value: int, bytes_each: int, device: torch.device) -> None:
    """Raise ValueError if an option asks for more memory than can be had, with what would fit."""
    free = free_memory(device)
    if value * bytes_each > free:
        raise ValueError(
            f"{option}={value} takes {value * bytes_each / GIB:.1f} GiB on {device}, where "
            f"{free / GIB:.1f} GiB are free: at most {free // bytes_each} would fit"
        )


def cpu_pool_budget(least: int) -> int:
    """Most bytes that a KV pool in main memory takes: 4 GiB or a quarter of what is free.

    Args:
        least: bytes of one sequence, which may take half of what is free.
    """
    free = free_cpu_memory()
    return max(min(CPU_POOL_LIMIT, free // 4), min(least, free // 2))


@dataclass
class CudaBudget:
    """Tells what one engine has taken of a GPU since this object was made.

    Only the growth of this process's own allocations counts: what other engines and processes
    hold just limits what is free.
    """

    device: torch.device
    start: int = field(init=False)

    def __post_init__(self) -> None:
        torch.cuda.synchronize(self.device)
        self.start = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes that the engine held at most, since it began."""
        return torch.cuda.max_memory_allocated(self.device) - self.start

    def growth_of(self, make: Callable[[], object]) -> int:
        """Bytes that something takes as long as it lives; it is made to see, and dropped."""
        self._collect()
        before = torch.cuda.memory_reserved(self.device)
        made = make()
        growth = torch.cuda.memory_reserved(self.device) - before
        del made
        return max(0, growth)

    def pool_bytes(self, utilization: float, later_bytes: int) -> int:
        """Bytes for the KV pool: the engine's share of the GPU less what it takes, if it is free.

        Call it with the peak behind: weights loaded, the largest step run.

        Args:
            utilization: the engine's share of the GPU.
            later_bytes: what will be allocated after the pool.
        """
        self._collect()
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_allocated(self.device) - self.start
        available = free - (self.peak() - held) - CUDA_MARGIN
        return int(min(total * utilization - self.peak(), available)) - later_bytes

    def _collect(self) -> None:
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()
