"""Team: how the ranks of tensor parallelism are started, find each other and are watched."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nanovllm.layers.device_groups import connect
from nanovllm.utils.parallel import Forkable, HostGroup, error_of

# For a process to start, import torch and find the others; under torchrun, on all machines.
START_S = 600.0
# For a process that was told to end.
END_S = 5.0
_has_joined_torchrun = False


class Seat(NamedTuple):
    """A rank's place among the others.

    store: in which the ranks find each other. is_local: all of them are on this machine. gpu: the
    index of the rank's GPU; None: rank 0's, and so many further.
    """

    store: Any
    rank: int
    size: int
    is_local: bool
    gpu: int | None = None

    def device(self, first: str) -> str:
        """The option `device` of this rank, where rank 0's is `first`."""
        kind, _, index = first.partition(":")
        if kind != "cuda":
            return first
        return f"cuda:{int(index) + self.rank if self.gpu is None else self.gpu}"

    def connect(self, device: str) -> HostGroup:
        """The group of all ranks; each calls this, once rank 0 has told the options."""
        where = self.store, self.rank, self.size, self.is_local
        return connect(*where, torch.device(device))


def torchrun_seat(size: int) -> Seat | None:
    """This process's place, if torchrun has started it as one of so many ranks.

    Raises:
        ValueError: torchrun started another number of processes.
        RuntimeError: a second time; the other ranks have ended with the first engine.
    """
    global _has_joined_torchrun
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size == 1:  # a process by itself may be told so as well
        return None
    if world_size != size:
        raise ValueError(
            f"tensor_parallel_size={size}, but torchrun has started {world_size} processes"
        )
    if _has_joined_torchrun:
        raise RuntimeError(
            "under torchrun a script makes one engine: the other ranks end with the first"
        )
    _has_joined_torchrun = True
    store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_S)))
    is_local = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    gpu = int(os.environ.get("LOCAL_RANK", "0"))
    return Seat(dist.PrefixStore("nanovllm", store), rank, size, is_local, gpu)


class Team(Forkable):
    """Rank 0's other ranks: processes that it starts, unless torchrun has.

    Args:
        size: ranks, itself included.
        seat: rank 0's under torchrun.
    """

    def __init__(self, size: int, seat: Seat | None) -> None:
        super().__init__()
        self._pid = os.getpid()
        self.size = size
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.group: HostGroup | None = None
        self._seat = seat
        if seat is not None:
            self.with_threads.append(seat.store)

    def start(self, options: dict[str, Any]) -> HostGroup:
        """Start the processes, wait until all ranks are there, and connect them.

        Args:
            options: of the engine, which each of the others makes its Config of.

        Raises:
            ValueError: fewer GPUs than ranks.
            Exception: a rank's, which did not come.
        """
        device = options["device"]
        if self._seat is None:
            _require_gpus(device, self.size)
            self._seat = self._start(self.size)
        seat = self._seat
        seat.store.set("options", json.dumps(options))
        for rank in range(1, seat.size):
            end = monotonic() + START_S
            while not seat.store.check([f"ready/{rank}"]):
                if (failure := self.failure()) is not None:
                    raise failure
                if monotonic() > end:
                    raise RuntimeError(f"rank {rank} did not come within {START_S:.0f} s")
                sleep(0.02)
        self.group = seat.connect(device)
        return self.group

    def _start(self, size: int) -> Seat:
        """Start the processes, each a module of this package: the script is not run again."""
        with socket.create_server(("127.0.0.1", 0)) as server:  # a free port, of this machine only
            port = server.getsockname()[1]
            timeout = timedelta(seconds=START_S)
            how: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False}
            store = dist.TCPStore(
                "127.0.0.1", port, None, True, **how, master_listen_fd=server.detach()
            )
        # What failed can be asked for while `store` waits for a rank.
        self._errors = dist.TCPStore("127.0.0.1", port, None, False, **how)
        self.with_threads += [store, self._errors]
        package = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
            "PYTHONSAFEPATH": "1",  # of the caller's directory nothing is imported
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the end of rank 0 is no news
        for rank in range(1, size):
            command = [sys.executable, "-m", "nanovllm.engine.workers", str(rank), str(size)]
            self.processes[rank] = subprocess.Popen(
                [*command, str(port)],
                stdin=subprocess.PIPE,  # it ends when this end is closed, by whatever
                env=environment,
                process_group=0,  # Ctrl-C is for rank 0
            )
        return Seat(store, 0, size, is_local=True)

    def failure(self) -> Exception | None:
        """What ended a rank before its time; None while all are there."""
        if not self.processes:  # nobody started any yet, or torchrun did, and looks after them
            return None if self._seat is None else self._told_error(self._seat.store)
        for rank, process in self.processes.items():
            status = process.poll()
            if status is not None and status < 0:
                return RuntimeError(f"rank {rank} was killed by {_signal_name(-status)}")
            if status is not None:
                ended = RuntimeError(f"rank {rank} has ended with status {status}")
                return self._told_error(self._errors) or ended
        return None

    def _told_error(self, store: Any) -> Exception | None:
        """The first rank's error that has told of one."""
        with suppress(RuntimeError):  # the store is gone
            for rank in range(1, self.size):
                if store.check([f"error/{rank}"]):
                    return error_of(rank, *json.loads(store.get(f"error/{rank}")))
        return None

    def cause_of(self, error: Exception) -> Exception:
        """The error of another rank, if within two seconds one shows; else this rank's own."""
        end = monotonic() + 2
        while monotonic() < end:
            if (failure := self.failure()) is not None:
                return failure
            sleep(0.02)
        return error

    @property
    def is_own(self) -> bool:
        """False in a process that has forked from the one whose team it is."""
        return self._pid == os.getpid()

    def after_fork(self) -> None:
        """The processes are the parent's, and end with that one alone."""
        super().after_fork()
        self._let_go()

    def _let_go(self) -> None:
        """Close this process's end of what the others end with."""
        for process in self.processes.values():
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()

    def end(self) -> None:
        """See that the processes have ended; those that take longer are killed."""
        self._let_go()
        end = monotonic() + END_S
        for process in self.processes.values():
            try:
                process.wait(max(0.0, end - monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _require_gpus(device: str, size: int) -> None:
    kind, _, index = device.partition(":")
    if kind == "cuda" and (last := int(index) + size - 1) >= (found := torch.cuda.device_count()):
        raise ValueError(
            f"tensor_parallel_size={size} from {device} on takes GPUs up to cuda:{last}, but there "
            f"are {found}"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
