"""Who uses the model next: one at a time, every visitor in rotation."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from .refusals import Refused


class Turns:
    """A lock of threads that is fair to visitors: each holds it once before anyone holds it twice.

    Whoever adds documents takes a turn for every portion of them, so that a question waits for one portion.

    Args:
        waiting: threads that may wait at most.
    """

    def __init__(self, waiting: int):
        self._most, self._taken = waiting, False
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, deque[threading.Event]] = OrderedDict()

    @contextmanager
    def of(self, visitor: str) -> Iterator[None]:
        """Holds the model for a visitor. Raises Refused if too many wait."""
        self._take(visitor)
        try:
            yield
        finally:
            self._give_back()

    @property
    def waiting(self) -> int:
        with self._lock:
            return sum(map(len, self._lines.values()))

    def _take(self, visitor: str) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            if sum(map(len, self._lines.values())) >= self._most:
                raise Refused("Too many people are asking at the moment: try again in a minute.")
            turn = threading.Event()
            self._lines.setdefault(visitor, deque()).append(turn)
        turn.wait()

    def _give_back(self) -> None:
        with self._lock:
            if not self._lines:
                self._taken = False
                return
            visitor, line = self._lines.popitem(last=False)
            turn = line.popleft()
            if line:
                self._lines[visitor] = line  # behind all others
            turn.set()
