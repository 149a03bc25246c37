"""How many commits of a store each change of a person was: an upload is undone as a whole."""

import json
from pathlib import Path

from msa_hf.modeling.memory_files import replace_json

from .refusals import Refused

FILE = "changes.json"


class Changes:
    """The changes of a library that can be undone and redone, kept in its folder.

    A change is noted after each of its commits, so that one that was interrupted is undone as far as it went.
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._done: list[int] = []
        self._undone: list[int] = []
        self._begun = False
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._done, self._undone = kept["done"], kept["undone"]

    @property
    def undoable(self) -> int:
        return len(self._done)

    @property
    def redoable(self) -> int:
        return len(self._undone)

    def begin(self) -> None:
        """The next commits are another change."""
        self._begun = False

    def note(self, commits: int = 1) -> None:
        """Commits of the change that was begun."""
        if not commits:
            return
        if not self._begun:
            self._done.append(0)
            self._begun = True
        self._done[-1] += commits
        self._undone = []
        self._keep()

    def undo(self, step) -> None:
        """Calls step(commits) for the last change. Raises Refused if there is none."""
        if not self._done:
            raise Refused("There is nothing to undo.")
        step(self._done[-1])
        self._undone.append(self._done.pop())
        self._keep()

    def redo(self, step) -> None:
        if not self._undone:
            raise Refused("There is nothing to redo.")
        step(self._undone[-1])
        self._done.append(self._undone.pop())
        self._keep()

    def clear(self) -> None:
        """What was erased cannot be brought back, nor what came before it."""
        self._done, self._undone = [], []
        self._keep()

    def _keep(self) -> None:
        replace_json(self._path, {"done": self._done, "undone": self._undone}, "new")
