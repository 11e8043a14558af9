"""Ranks that share a model on GPUs: what they exchange stays on the devices.

`connect` is the one place that tells which of them is used.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm import kernels
from nanovllm.utils.parallel import FOREVER, HostGroup
from nanovllm.utils.peer_memory import PeerMemory

# Up to how many bytes each of so many ranks, or more, adds up all of them itself. Of two ranks this
# saves a meeting and moves no more. Measured on H100s.
MOST_ONE_SHOT = {2: 1 << 21, 3: 1 << 18}
# What a rank is told that waits for one that is gone: more meetings than there ever are.
FREED = 1 << 62


def connect(store: Any, rank: int, size: int, is_local: bool, device: torch.device) -> HostGroup:
    """The group of all ranks, which each of them asks for.

    Args:
        store: in which the ranks find each other.
        is_local: all ranks are on one machine.
        device: this rank's.
    """
    where = rank, size, is_local
    group = HostGroup(dist.PrefixStore("host", store), *where)
    if device.type != "cuda":
        return group
    # All ranks take the same.
    if group.least(_sees_peers(rank, size, is_local, device)):
        return PeerGroup(dist.PrefixStore("peers", store), *where, device)
    return NcclGroup(dist.PrefixStore("nccl", store), *where, device)


def _sees_peers(rank: int, size: int, is_local: bool, device: torch.device) -> bool:
    """True if this rank's GPU reads and writes the memory of all others."""
    if not is_local or not kernels.usable(device) or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    gpus = [device.index - rank + other for other in range(size) if other != rank]
    return all(torch.cuda.can_device_access_peer(device.index, gpu) for gpu in gpus)


class DeviceGroup(HostGroup):
    """What both kinds have in common.

    Args:
        device: this rank's GPU.
    """

    def __init__(
        self, store: Any, rank: int, size: int, is_local: bool, device: torch.device
    ) -> None:
        super().__init__(store, rank, size, is_local)
        self.device = device

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)


class NcclGroup(DeviceGroup):
    """By NCCL."""

    def __init__(
        self, store: Any, rank: int, size: int, is_local: bool, device: torch.device
    ) -> None:
        super().__init__(store, rank, size, is_local, device)
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = FOREVER
        self._nccl = nccl(dist.PrefixStore("device", store), rank, size, options)
        self._nccl.eager_connect_single_device(device)
        self.with_threads.append(self._nccl)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._nccl.allreduce([x]).wait()
        return x

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._nccl.allreduce([keys], options).wait()
        return keys

    def all_gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.size, *x.shape)
        self._nccl._allgather_base(parts, x.contiguous()).wait()
        return parts.transpose(0, 1).flatten(1)

    def release(self) -> None:
        self._nccl.abort()


class PeerGroup(DeviceGroup):
    """By kernels that read and write the memory of GPUs of one machine: see kernels.all_reduce."""

    def __init__(
        self, store: Any, rank: int, size: int, is_local: bool, device: torch.device
    ) -> None:
        super().__init__(store, rank, size, is_local, device)
        self.most_one_shot = MOST_ONE_SHOT[min(size, 3)]
        self._turn = 0
        self._meetings: Tensor | None = None

    def reserve(self, num_bytes: int, num_keys: int) -> None:
        """Memory that all ranks read and write: three small parts, keys, a large one, meetings."""
        from nanovllm.kernels.all_reduce import MAX_PROGRAMS, Peers

        meetings_bytes = MAX_PROGRAMS * self.size * 8
        large_bytes, key_bytes = (-(-size // 128) * 128 for size in (num_bytes, 8 * num_keys))
        data_bytes = 3 * self.most_one_shot + key_bytes + large_bytes
        self.nbytes = data_bytes + meetings_bytes
        self._memory = PeerMemory(self.nbytes, self.device)
        torch.cuda.synchronize(self.device)
        own = torch.frombuffer(bytearray(self._memory.handle), dtype=torch.uint8)
        self._base = self._memory.tensor.data_ptr()
        bases = [
            self._base if rank == self.rank else self._memory.open(handle.numpy().tobytes())
            for rank, handle in enumerate(self.exchange(own))  # all of them are zeros by now
        ]
        buffers = torch.tensor(bases, dtype=torch.int64, device=self.device)
        counts = torch.zeros(MAX_PROGRAMS, dtype=torch.int64, device=self.device)
        self._peers = Peers(buffers, buffers + data_bytes, counts, self.rank, self.size)
        *self._small, self._keys, self._large, self._meetings = self._memory.tensor.split(
            [self.most_one_shot] * 3 + [key_bytes, large_bytes, meetings_bytes]
        )
        self._freed = torch.full((meetings_bytes // 8,), FREED, device="cpu").pin_memory()
        self.least(0)  # no rank goes on, or gives its memory back, before all have opened it

    def output(
        self, num_tokens: int, size: int, dtype: torch.dtype, is_first: bool = False
    ) -> Tensor:
        num_bytes = num_tokens * size * dtype.itemsize
        memory = self._large
        if num_bytes <= self.most_one_shot:
            # A step begins in the first part, and each sum moves on to another: so none overwrites
            # what others still read, whatever steps follow one another.
            self._turn = 0 if is_first else self._turn
            memory = self._small[self._turn]
        return _placed(memory, (num_tokens, size), dtype)

    def keys_output(self, num_rows: int) -> Tensor:
        return _placed(self._keys, (num_rows,), torch.int64)

    def all_reduce(self, x: Tensor) -> Tensor:
        from nanovllm.kernels.all_reduce import one_shot, two_shot

        if x.nbytes > self.most_one_shot:
            return two_shot(x, self._peers, self._base)
        # To where the next output will be: what is added to it need not be copied there.
        self._turn = 2 if self._turn == 1 else 1
        out = _placed(self._small[self._turn], x.shape, x.dtype)
        return one_shot(x, self._peers, self._base, out)

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        from nanovllm.kernels.all_reduce import one_shot

        return one_shot(keys, self._peers, self._base, torch.empty_like(keys), maximum=True)

    def all_gather(self, x: Tensor) -> Tensor:
        from nanovllm.kernels.all_reduce import gather

        place = _placed(self._large, x.shape, x.dtype)
        return gather(place.copy_(x), self._peers, self._base)

    def release(self) -> None:
        if self._meetings is None:
            return
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # beside the kernel that waits
            self._meetings.view(torch.int64).copy_(self._freed, non_blocking=True)
            torch.cuda.current_stream().synchronize()


def _placed(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that begins where the memory, uint8, does."""
    placed: Tensor = memory[: math.prod(shape) * dtype.itemsize].view(dtype)
    return placed.view(*shape)
