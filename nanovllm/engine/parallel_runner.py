"""ParallelRunner: rank 0 of a model that several ranks share. It has the others do what it does."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, TypeVar
from weakref import finalize

from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.messages import (
    CHECK_WEIGHTS,
    END,
    LOAD_WEIGHTS,
    NOTHING,
    STEP,
    pack_path,
    pack_step,
    unpack_step,
)
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Done, Launched
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.team import Seat, Team, torchrun_seat
from nanovllm.utils.device import resolve_device

T = TypeVar("T")
# While it waits, rank 0 looks this often whether the others are still there (seconds).
LOOK_AROUND = 0.05
# What a GPU is given to go on after it has waited for a rank that is gone (seconds).
RELEASE_S = 2.0


def make_runner(config: Config) -> ModelRunner:
    """The runner of an engine.

    Raises:
        SystemExit: in a process that torchrun has started as another rank than 0, once rank 0's
            engine has ended.
    """
    if config.tensor_parallel_size == 1:
        return ModelRunner(config)
    seat = torchrun_seat(config.tensor_parallel_size)
    if seat is not None and seat.rank > 0:
        from nanovllm.engine.workers import serve

        serve(seat)
    return ParallelRunner(config, seat)


class ParallelRunner(ModelRunner):
    """A ModelRunner on rank 0, and one on each other rank, in step.

    What it does it does in a thread of its own. So Ctrl-C, which breaks off the caller's waiting,
    never leaves a step that some ranks have begun and others have not; and the caller's thread can
    look after the other ranks. If one is gone, what rank 0 waits for will not come: it raises, and
    the engine is of no more use.

    Args:
        config: the engine's options.
        seat: rank 0's place under torchrun; None: it starts the others itself.

    Raises:
        ValueError: as ModelRunner, on whichever rank.
        RuntimeError: a rank did not start, or has ended.
    """

    def __init__(self, config: Config, seat: Seat | None = None) -> None:
        self._failure: Exception | None = None
        self._broken: BaseException | None = None  # what left the ranks out of step
        self._is_ending = False
        self._thread = _Thread()
        self._team = Team(config.tensor_parallel_size, seat)
        self._end = finalize(self, _end, self._team, self._thread)
        try:
            self._do(partial(self._begin, config, is_local=seat is None))
        except BaseException:
            self._end()
            raise

    def _begin(self, config: Config, is_local: bool) -> None:
        group = self._team.start(_options_of_all(config, is_local))
        ModelRunner.__init__(self, config, group)

    def launch(self, batch: Batch) -> Launched:
        message = pack_step(batch)  # it stays as it is, whatever becomes of the batch
        step = partial(ModelRunner.launch, self)
        launched = self._together(STEP, message, lambda: step(unpack_step(message)))
        done = None if launched.done is None else _Watched(self._do, launched.done)
        return launched._replace(batch=batch, done=done)

    def check_weights(self, model_dir: Path) -> None:
        self._raise_first(CHECK_WEIGHTS, model_dir, partial(ModelRunner.check_weights, self))

    def load_weights(self, model_dir: Path) -> None:
        self._raise_first(LOAD_WEIGHTS, model_dir, partial(ModelRunner.load_weights, self))

    def synchronize(self) -> None:
        """An error that shows here is told to whoever wants the next step."""
        if self._failure is None and not self._is_ending:
            with suppress(Exception):
                self._do(partial(ModelRunner.synchronize, self))

    def free(self) -> None:
        """Whatever has become of the other ranks, and as often as it is asked for."""
        free = partial(ModelRunner.free, self)
        try:
            if self._failure is None and not self._is_ending:
                self._is_ending = True
                with suppress(Exception):  # a rank was gone
                    self._together(END, NOTHING, free)
            elif self._end.alive:  # in vain, if a GPU still waits for a rank that is gone
                wait([self._thread.submit(free)], RELEASE_S)
        finally:
            self._end()

    def _raise_first(self, kind: int, model_dir: Path, work: Callable[[Path], None]) -> None:
        """Have all ranks do something that may fail on some, and raise the first error."""
        assert self._team.group is not None
        run = partial(self._team.group.first_error, partial(work, model_dir))
        if (error := self._together(kind, pack_path(model_dir.absolute()), run)) is not None:
            raise error

    def _together(self, kind: int, message: Tensor, work: Callable[[], T]) -> T:
        """Have all ranks do something. What fails in the midst of it leaves them out of step."""
        group = self._team.group
        assert group is not None

        def tell_and_work() -> T:
            group.tell(kind, message)
            return work()

        return self._do(tell_and_work)

    def _do(self, work: Callable[[], T]) -> T:
        """Do something in the runner's thread, while this one looks after the other ranks."""
        if self._failure is not None:
            raise RuntimeError(f"this engine has lost a rank ({self._failure}); make a new one")
        if self._thread.is_current():
            return work()
        future = self._thread.submit(partial(self._in_step, work))
        while not wait([future], LOOK_AROUND).done:
            if not self._is_ending and (failure := self._team.failure()) is not None:
                self._fail(failure)
                raise failure
        error = future.exception()
        if isinstance(error, Exception):
            if not isinstance(error, (TypeError, ValueError)) and not self._is_ending:
                error = self._team.cause_of(error)
            self._fail(error)
            raise error
        return future.result()

    def _in_step(self, work: Callable[[], T]) -> T:
        """In the thread: an error is kept, for the caller may not be there any more to hear it."""
        if self._broken is not None:
            raise self._broken
        try:
            return work()
        except BaseException as error:
            self._broken = error
            raise

    def _fail(self, error: Exception) -> None:
        """Part with the other ranks: what one of them, or this one, has begun will not be ended."""
        self._failure = error
        _release(self._team)
        self._team.end()


def _options_of_all(config: Config, is_local: bool) -> dict[str, Any]:
    """The options that all ranks are given, decided on this one."""
    device = resolve_device(config.device)
    options = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.init}
    options["dtype"] = str(config.resolve_dtype(device)).removeprefix("torch.")
    path = config.model_dir.absolute() if is_local else config.model
    return options | {"model": str(path), "device": str(device)}


class _Watched:
    """An event that is waited for while the other ranks are looked after."""

    def __init__(self, do: Callable[[Callable[[], None]], None], event: Done) -> None:
        self._do, self._event = do, event

    def synchronize(self) -> None:
        self._do(self._event.synchronize)


class _Thread:
    """Does what it is given, one thing after the other. At exit nothing waits for it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(self._queue,), daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        return self._thread.ident == get_ident()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def end(self) -> None:
        """Once all that it was given is done."""
        self._queue.put(None)

    @staticmethod
    def _work(queue: "SimpleQueue[Callable[[], None] | None]") -> None:
        while (run := queue.get()) is not None:
            run()
            del run  # and with it the engine, if nobody else has it


def _end(team: Team, thread: _Thread) -> None:
    """What is under way is let end, and then the other ranks."""
    if not team.is_own:
        return
    settled = thread.submit(lambda: None if team.group is None else team.group.settle())
    if not wait([settled], RELEASE_S).done:
        _release(team)
    thread.end()
    team.end()


def _release(team: Team) -> None:
    """Free what waits on this rank's GPU for another one."""
    if team.group is not None:
        release = Thread(target=team.group.release, daemon=True)
        release.start()
        release.join(RELEASE_S)
