"""Tensor parallelism: the ranks that hold a part of a model each, and what they tell one another.

Every rank computes the same step on its part of each layer, and calls what is here at the same
places in the same order. A process may belong to many groups: torch's own, global one stays the
caller's.
"""

import ctypes
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Of what waits for the next step, or for a rank that compiles kernels: a rank that ends is noticed
# without it.
FOREVER = timedelta(days=365)
# int64 numbers of a message that travel at once, enough for most steps; longer ones take a second
# journey, which takes longer than all of this.
FRAME = 4096


class Forkable:
    """What is told, in a process that has forked from its own, that it is the parent's."""

    _all: ClassVar[WeakSet["Forkable"]] = WeakSet()

    def __init__(self) -> None:
        # Objects of torch's with threads of their own. In a forked child these threads are not, and
        # whoever freed the objects would wait for them for ever: it never does.
        self.with_threads: list[Any] = []
        Forkable._all.add(self)

    def after_fork(self) -> None:
        """In the child."""
        for thing in self.with_threads:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    for each in list(Forkable._all):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class RankGroup:
    """The ranks that share a model, as one of them sees it. This one shares it with no other."""

    rank = 0
    size = 1
    # Bytes of device memory that torch's allocator does not know of.
    nbytes = 0

    def part_of(self, whole_size: int, size: int) -> int:
        """Where this rank's part of a dimension begins.

        Args:
            whole_size: of the dimension; size: of the part. Of fewer parts than ranks each is held
                by neighbouring ranks.
        """
        num_parts = whole_size // size
        return self.rank * num_parts // self.size * size

    def reserve(self, num_bytes: int, num_keys: int) -> None:
        """For the largest all_reduce or all_gather, and all_reduce_max; called once, first."""

    def output(
        self, num_tokens: int, size: int, dtype: torch.dtype, is_first: bool = False
    ) -> Tensor | None:
        """Memory where all_reduce wants its argument to be; None: it may be anywhere.

        Args:
            is_first: of its step.

        Returns:
            [num_tokens, size].
        """
        return None

    def keys_output(self, num_rows: int) -> Tensor | None:
        """Likewise for all_reduce_max: int64 [num_rows]."""
        return None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, the same on each; x may be overwritten, and be the result."""
        return x

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        """The largest of all ranks' int64 keys [n], element by element; likewise."""
        return keys

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x [num_rows, size], side by side: [num_rows, group's size * size]."""
        return x

    def least(self, number: int) -> int:
        """The least of all ranks' numbers. They are host numbers, as in what follows."""
        return number


class HostGroup(RankGroup, Forkable):
    """Ranks that exchange what lies in main memory, by Gloo.

    Args:
        store: in which the ranks find each other.
        rank, size: of this group.
        is_local: all ranks are on one machine, whose name need not lead anywhere.
    """

    def __init__(self, store: Any, rank: int, size: int, is_local: bool) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        gloo: Any = dist.ProcessGroupGloo
        if is_local:
            options = gloo._Options()
            options._timeout, options._threads = FOREVER, 1
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            self._gloo = gloo(store, rank, size, options)
        else:  # GLOO_SOCKET_IFNAME may say by which network
            self._gloo = gloo(store, rank, size, FOREVER)
        self.with_threads.append(self._gloo)

    def exchange(self, x: Tensor) -> list[Tensor]:
        """All ranks' x, in the order of the ranks.

        By sends and receives, since Gloo's collectives, which take turns in threads of its own,
        take ten times as long (0.1 ms for a pair of ranks, not 1.4 ms).
        """
        x = x.contiguous()
        parts = [x if rank == self.rank else torch.empty_like(x) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = [self._gloo.recv([parts[rank]], rank, 0) for rank in others]
        works += [self._gloo.send([x], rank, 0) for rank in others]
        for work in works:
            work.wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = torch.stack(self.exchange(x))
        return parts.to(torch.promote_types(x.dtype, torch.float32)).sum(dim=0).to(x.dtype)

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        return torch.stack(self.exchange(keys)).amax(dim=0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.exchange(x), dim=1)

    def least(self, number: int) -> int:
        return int(min(torch.cat(self.exchange(torch.tensor([number], device="cpu")))))

    def tell(self, kind: int, message: Tensor) -> None:
        """From rank 0 to all others: a number and int64 [n], on the CPU.

        It returns when they are on their way, and waits if a rank has not yet taken earlier ones.
        """
        frame = torch.zeros(FRAME, dtype=torch.int64, device="cpu")
        head, rest = message[: FRAME - 2], message[FRAME - 2 :]
        frame[0], frame[1] = kind, len(message)
        frame[2 : 2 + len(head)] = head
        parts = [frame, rest.contiguous()] if len(rest) else [frame]
        works = [self._gloo.send([part], to, 1) for to in range(1, self.size) for part in parts]
        for work in works:
            work.wait()

    def hear(self) -> tuple[int, Tensor]:
        """Wait for what rank 0 tells."""
        frame = torch.empty(FRAME, dtype=torch.int64, device="cpu")
        self._gloo.recv([frame], 0, 1).wait()
        kind, size = frame[:2].tolist()
        message = frame[2 : 2 + size]
        if size > len(message):
            rest = torch.empty(size - len(message), dtype=torch.int64, device="cpu")
            self._gloo.recv([rest], 0, 1).wait()
            message = torch.cat((message, rest))
        return kind, message

    def first_error(self, work: Callable[[], object]) -> Exception | None:
        """Do what may fail on some ranks and needs no other: the error of the first with one."""
        own: Exception | None = None
        try:
            work()
        except Exception as error:
            own = error
        text = b"" if own is None else f"{type(own).__name__}\n{own}".encode(errors="replace")
        note = np.zeros(2048, dtype=np.uint8)
        note[: len(text)] = np.frombuffer(text[: len(note)], dtype=np.uint8)
        for rank, part in enumerate(self.exchange(torch.from_numpy(note))):
            if part[0]:
                said = part.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
                return own if rank == self.rank else error_of(rank, *said.split("\n", 1))
        return None

    def settle(self) -> None:
        """Wait until nothing is under way on this rank's device."""

    def release(self) -> None:
        """Let a rank that waits on its device for one that is gone go on; with garbage."""


def error_of(rank: int, kind: str, text: str) -> Exception:
    """An error that another rank has told of, of its own kind if that may be raised here."""
    kinds = {"ValueError": ValueError, "TypeError": TypeError, "MemoryError": MemoryError}
    return kinds.get(kind, RuntimeError)(f"rank {rank}: {text}")
