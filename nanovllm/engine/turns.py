"""Turns: one thread at a time changes an engine; who cannot wait leaves a note."""

from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import TypeVar
from weakref import WeakMethod

T = TypeVar("T")

# A sleeper looks around this often, in case that whoever had to wake it was interrupted (seconds).
LOOK_AROUND = 0.1


def never() -> bool:
    return False


def always() -> bool:
    return True


class _Place:
    """A thread's place in the line, and how it is woken."""

    def __init__(self, has_news: Callable[[], bool]) -> None:
        self.thread = get_ident()
        self.has_news = has_news
        self.alarm: SimpleQueue[None] = SimpleQueue()


class Turns:
    """Says whose turn it is to change an engine, and whether a change broke off.

    Threads stand in a line; the first has the turn:

        idle --take--> whole --change--> changing --done--> whole --end of work--> idle
                         ^                  | an exception, Ctrl-C    (or the next one's turn)
                         +---- repair ---- broken                    (whoever comes next repairs)

    A thread that stands in the line already, since a signal handler or the garbage collector has
    interrupted it there, can neither wait nor change anything: it leaves a note, a change that is
    made once no other is under way.

    Ctrl-C may come between any two calls, so each of these facts changes in one step: a place is
    taken by one append and left by one remove; a note stays until it has been carried out, and can
    be carried out twice.

    Args:
        repair: makes what is left of a change that broke off whole again.
        whole: called at the end of each change.
    """

    def __init__(
        self, repair: "WeakMethod[Callable[[], None]]", whole: "WeakMethod[Callable[[], None]]"
    ) -> None:
        self._line: deque[_Place] = deque()
        self._notes: deque[Callable[[], None]] = deque()
        self._repair = repair
        self._whole = whole
        self._is_broken = False

    def is_inside(self) -> bool:
        """True if the calling thread stands in the line: it has interrupted itself."""
        thread = get_ident()
        return any(place.thread == thread for place in list(self._line))

    def take(
        self,
        work: Callable[[], object],
        has_news: Callable[[], bool] = never,
        while_waiting: Callable[[], None] = lambda: None,
        retries: int = 2,
    ) -> None:
        """Do some work when it is the caller's turn, unless there is news for it before.

        Args:
            work: makes its changes by `change`.
            has_news: true once the caller need wait no longer. Other threads ask it.
            while_waiting: called several times a second.
            retries: how often notes that are left are tried again; then they are the next one's.
        """
        assert not self.is_inside()
        place = _Place(has_news)
        try:
            self._line.append(place)
            if self._wait(place, while_waiting):
                self._settle()
                work()
                self._settle()
        finally:
            try:  # noqa: SIM105 (one call, which nothing interrupts)
                self._line.remove(place)
            except ValueError:
                pass
            self._wake(0)
            # Left after this thread had looked; or it failed, as the next try may.
            if retries and self._notes and not self._line:
                self.take(lambda: None, retries=retries - 1)

    def change(self, change: Callable[[], T]) -> T:
        """Make a change in one's turn: what was broken is repaired, and notes are carried out."""
        self._settle()
        result = self._make(change)
        self._wake(1)
        return result

    def note(self, change: Callable[[], None], waits: bool = True) -> None:
        """Have a change made: at once, or, if one is under way in this thread, after it.

        Args:
            change: does no harm if it is made twice.
            waits: until another thread's change is done. If not, the change may be left to it.
        """
        self._notes.append(change)
        if self.is_inside():
            return
        self.take(lambda: None, lambda: not waits or change not in self._notes)

    def _wait(self, place: _Place, while_waiting: Callable[[], None]) -> bool:
        """Wait until it is the turn of a place (True) or there is news for it."""
        while self._line[0] is not place:
            if place.has_news():
                return False
            while_waiting()
            try:  # noqa: SIM105
                place.alarm.get(timeout=LOOK_AROUND)
            except Empty:
                pass
        return True

    def _wake(self, first: int) -> None:
        """Wake those for whom there is news from a place on, and whoever's turn it is."""
        for index, place in enumerate(list(self._line)[first:], first):
            if index == 0 or place.has_news():
                place.alarm.put(None)

    def _settle(self) -> None:
        if self._is_broken and (repair := self._repair()):
            self._make(repair)
        while self._notes:
            self._make(self._notes[0])
            self._notes.popleft()

    def _make(self, change: Callable[[], T]) -> T:
        self._is_broken = True
        result = change()
        if whole := self._whole():
            whole()
        self._is_broken = False
        return result
