"""Whose turn it is: a bounded queue that lets every client pass in rotation."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from .errors import queue_full, shutting_down, timed_out


class Turns:
    """At most `concurrent` holders at once, at most `waiting` who wait; of one event loop.

    Clients take turns; the requests of one client keep their order. A client that sends many requests makes
    its own wait, not those of others.
    """

    def __init__(self, concurrent: int, waiting: int):
        self._concurrent, self._most = concurrent, waiting
        self._lines: OrderedDict[str, deque[asyncio.Future]] = OrderedDict()
        self._closed = False
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    def check_open(self) -> None:
        """Raises RequestError after `close`."""
        if self._closed:
            raise shutting_down()

    async def take(self, client: str, seconds: float) -> None:
        """Returns when it is the caller's turn, who must then `give_back` it. Raises RequestError if too
        many wait, if it takes too long, or after `close`."""
        self.check_open()
        if self.running < self._concurrent and not self._lines:
            self.running += 1
            return
        if self.waiting >= self._most:
            raise queue_full()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future = loop.create_future()
        self._lines.setdefault(client, deque()).append(turn)
        # No wait_for: before Python 3.12 it loses a cancellation that comes together with the turn.
        alarm = loop.call_later(seconds, _refuse, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back()  # it was given in the moment in which the caller left
            raise
        finally:
            alarm.cancel()
            self._leave(client, turn)

    def give_back(self) -> None:
        self.running -= 1
        while self._lines and self.running < self._concurrent:
            client, line = self._lines.popitem(last=False)
            turn = line.popleft()
            if line:
                self._lines[client] = line  # behind all others
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def close(self) -> None:
        """Sends away all who wait, and all who come."""
        self._closed = True
        lines, self._lines = self._lines, OrderedDict()
        for turn in (turn for line in lines.values() for turn in line):
            if not turn.done():
                turn.set_exception(shutting_down())

    def _leave(self, client: str, turn: asyncio.Future) -> None:
        line = self._lines.get(client)
        if line is not None and turn in line:
            line.remove(turn)
            if not line:
                del self._lines[client]


def _refuse(turn: asyncio.Future) -> None:
    if not turn.done():
        turn.set_exception(timed_out())
