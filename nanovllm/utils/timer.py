"""Timer: where the time goes, by named region. logged: what takes long says so."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

logger = logging.getLogger("nanovllm")
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Tell the logger what begins, and how long it took."""
    logger.info("%s ...", what)
    begin_s = time.perf_counter()
    yield
    logger.info("%s: %.1f s", what, time.perf_counter() - begin_s)


class Timer:
    """Adds up the time spent in named regions.

    Args:
        device: on "cuda" a region's time runs from when the GPU reaches its start to when it
            reaches its end (CUDA events; nothing waits before `totals`); on "cpu" it is the wall
            clock's.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count the time of a with block under `name`; regions may nest."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((name, begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - begin_s)

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The same function, its calls counted under `name`."""

        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.region(name):
                return function(*args, **kwargs)

        return timed

    def totals(self) -> dict[str, tuple[float, int]]:
        """Seconds and number of entries of each region so far, the longest first."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for name, begin, end in self._events:
                self.add(name, begin.elapsed_time(end) / 1e3)
            self._events.clear()
        by_time = sorted(self._seconds.items(), key=lambda item: -item[1])
        return {name: (seconds, self._counts[name]) for name, seconds in by_time}

    def add(self, name: str, seconds: float) -> None:
        """Count a time that was measured otherwise."""
        self._seconds[name] += seconds
        self._counts[name] += 1
