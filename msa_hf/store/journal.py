"""The journal: commits, which versions of documents are visible at each, and the way back and forth.

A commit that changes documents has a parent: the one that `undo` returns to. Undo and redo are commits,
too, whose `state` is the change that is now current and whose `tip` is the last change that redo leads to.
So every number of a commit is a state of the store that can be read again.
"""

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..modeling.errors import MemoryFormatError
from .errors import HistoryError

# A version is visible at commit :at if one of its lives holds it.
VISIBLE = "lives.born <= :at AND (lives.died IS NULL OR lives.died > :at)"


@dataclass(frozen=True)
class Commit:
    """One commit: its number, when (seconds since 1970), what kind, and how many documents came and went."""

    version: int
    time: float
    kind: str
    added: int
    removed: int


class Journal:
    """Reads and writes the tables `commits` and `lives`; writing happens in the caller's transaction."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection

    def newest(self) -> int:
        """Number of the last commit."""
        (number,) = self.connection.execute("SELECT max(id) FROM commits").fetchone()
        if type(number) is not int:
            raise MemoryFormatError("the store's journal is damaged: there is no commit")
        return number

    def commits(self, limit: int = -1) -> list[Commit]:
        """The last commits, newest first."""
        rows = "SELECT id, time, kind, added, removed FROM commits ORDER BY id DESC LIMIT ?"
        return [Commit(*row) for row in self.connection.execute(rows, (limit,))]

    def append(
        self,
        kind: str,
        born: Sequence[int] = (),
        died: Sequence[int] = (),
        *,
        root: bool = False,
    ) -> int:
        """A change after the newest commit: versions that appear and disappear. A root cannot be undone."""
        _, state, _ = self._position()
        number = self.newest() + 1
        self._insert(number, kind, len(born), len(died), None if root else state, number, number)
        self._move(number, born, died)
        return number

    def undo(self, steps: int) -> int:
        """Returns to the state `steps` changes ago. Raises HistoryError if there are not so many."""
        _, state, tip = self._position()
        path = [state]
        while len(path) <= steps:
            parent = self._parent(path[-1])
            if parent is None:
                raise HistoryError(f"{steps} changes cannot be undone: there are only {len(path) - 1}")
            path.append(parent)
        return self._return_to("undo", path[-1], tip)

    def redo(self, steps: int) -> int:
        """Takes back `steps` undone changes. Raises HistoryError if there are not so many."""
        _, state, tip = self._position()
        undone = []
        while tip != state:
            undone.append(tip)
            tip = self._parent(tip)
            if tip is None:
                raise MemoryFormatError("the store's journal is damaged: its commits are not connected")
        if len(undone) < steps:
            raise HistoryError(f"{steps} changes cannot be redone: there are only {len(undone)}")
        return self._return_to("redo", undone[-steps], undone[0])

    def _position(self) -> tuple[int, int, int]:
        row = self.connection.execute(
            "SELECT id, state, tip FROM commits ORDER BY id DESC LIMIT 1"
        ).fetchone()
        if row is None or not all(type(number) is int for number in row):
            raise MemoryFormatError("the store's journal is damaged: its last commit cannot be read")
        return row

    def _parent(self, number: int) -> int | None:
        row = self.connection.execute("SELECT parent FROM commits WHERE id=?", (number,)).fetchone()
        if row is None or not (row[0] is None or type(row[0]) is int and row[0] < number):
            raise MemoryFormatError(f"the store's journal is damaged: commit {number} cannot be read")
        return row[0]

    def _return_to(self, kind: str, state: int, tip: int) -> int:
        """A commit whose visible versions are those of an earlier one."""
        now = "SELECT version FROM lives WHERE died IS NULL AND born > ?"
        then = "SELECT version FROM lives WHERE born <= ? AND died > ?"
        appeared = {version for (version,) in self.connection.execute(now, (state,))}
        vanished = {version for (version,) in self.connection.execute(then, (state, state))}
        number = self.newest() + 1
        born, died = sorted(vanished - appeared), sorted(appeared - vanished)
        self._insert(number, kind, len(born), len(died), None, state, tip)
        self._move(number, born, died)
        return number

    def _insert(self, number: int, kind: str, *rest: int | None) -> None:
        added, removed, parent, state, tip = rest
        values = (number, time.time(), kind, added, removed, parent, state, tip)
        self.connection.execute("INSERT INTO commits VALUES (?,?,?,?,?,?,?,?)", values)

    def _move(self, number: int, born: Iterable[int], died: Iterable[int]) -> None:
        end = "UPDATE lives SET died=? WHERE version=? AND died IS NULL"
        self.connection.executemany(end, ((number, version) for version in died))
        self.connection.executemany(
            "INSERT INTO lives VALUES (?, ?, NULL)", ((version, number) for version in born)
        )
