"""GPU memory that processes of one machine read and write together, by CUDA's own means.

torch has two of its own, which do not fit: torch.multiprocessing counts references in files that
stay behind when a process is killed, and symmetric memory expects that all processes have made the
same groups before, as an engine's ranks have not.
"""

import ctypes
import os
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

HANDLE_BYTES = 64
ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_byte * HANDLE_BYTES),)


class PeerMemory:
    """Zeroed memory of a GPU, which other processes can open.

    Its reference, `tensor`, is uint8 [num_bytes]; `handle`, bytes, is what others are to be given.

    Args:
        num_bytes: its size.
        device: the GPU; the current one.

    Raises:
        RuntimeError: CUDA refuses.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # which sees to it that this thread has the GPU's context
        self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        self._context, pointer = ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        self._give_back_by("cuMemFree_v2", pointer)
        self._interface = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (pointer.value, False), "version": 3,
        }  # fmt: skip
        self.tensor: Tensor = torch.as_tensor(_Array(self._interface), device=device).zero_()
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        self.handle = bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address of another process's memory here, as long as this object is there."""
        pointer = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        flag = ctypes.c_uint(ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), given, flag)
        self._give_back_by("cuIpcCloseMemHandle", pointer)
        return pointer.value

    def _give_back_by(self, name: str, pointer: ctypes.c_uint64) -> None:
        """When this object goes, in whatever thread; in a forked process, which has no GPU, not."""
        finalize(self, _give_back, os.getpid(), self._cuda, self._context, name, pointer)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            raise RuntimeError(
                f"{name}: {said}; where GPUs cannot share memory, NCCL_P2P_DISABLE=1 has ranks go "
                "without"
            )


def _give_back(
    pid: int, cuda: Any, context: ctypes.c_void_p, name: str, pointer: ctypes.c_uint64
) -> None:
    if os.getpid() == pid:
        cuda.cuCtxPushCurrent_v2(context)
        getattr(cuda, name)(pointer)
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class _Array:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface
