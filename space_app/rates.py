"""How often something may be done within a minute."""

import threading
from collections import deque
from collections.abc import Callable

from .refusals import Refused

MINUTE = 60.0


class Rate:
    """At most `limit` times within any minute.

    Args:
        what: is counted, in the plural, for the message. clock: seconds that only grow.
    """

    def __init__(self, limit: int, what: str, clock: Callable[[], float]):
        self._limit, self._what, self._clock = limit, what, clock
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Raises Refused, counting nothing, if there were too many."""
        with self._lock:
            now = self._clock()
            while self._times and self._times[0] <= now - MINUTE:
                self._times.popleft()
            if len(self._times) >= self._limit:
                seconds = max(1, round(self._times[0] + MINUTE - now))
                raise Refused(f"At most {self._limit} {self._what} a minute: try again in {seconds} seconds.")
            self._times.append(now)
