"""Visitors without accounts: a random key that only their browser knows, and a folder that it opens."""

import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .engine import Engine
from .history import History
from .library import Library
from .limits import Limits
from .rates import Rate
from .refusals import Refused

KEY = re.compile(r"[0-9a-f]{32}")  # 128 random bits
FOLDERS, STOP, HALT, USED = "sessions", "stop", "halt", "used"


class Session:
    """One visitor's library and conversation. `key` opens it; `name` is safe to show in a log."""

    def __init__(self, key: str, folder: Path, engine: Engine, limits: Limits, clock: Callable[[], float]):
        self.key, self.folder, self.name = key, folder, folder.name
        self.library = Library(folder, engine, limits, self.name)
        self.history = History(folder)
        self.questions = Rate(limits.questions_per_minute, "questions", clock)
        self.uploads = Rate(limits.uploads_per_minute, "uploads", clock)
        self.trials = Rate(limits.trials_per_minute, "tests", clock)
        self.asking = threading.Lock()  # one answer at a time: the next question may refer to it
        self.trying = threading.Lock()  # one comparison or needle test at a time
        self.used = clock()

    @property
    def stop(self) -> Path:
        """The file that ends the answer that is being written."""
        return self.folder / STOP

    @property
    def halt(self) -> Path:
        """The file that ends the comparison or the needle test that is running."""
        return self.folder / HALT

    def end_answer(self) -> None:
        """Ends the answer that is being written, if there is one."""
        if self.asking.locked():
            self.stop.touch()

    def end_trial(self) -> None:
        """Ends the comparison or the needle test, if one is running; what it has shown stays."""
        if self.trying.locked():
            self.halt.touch()

    @property
    def scratch(self) -> Path:
        """A new folder for the files of an upload."""
        return self.folder / "incoming" / secrets.token_hex(8)

    @property
    def busy(self) -> bool:
        return self.library.busy or self.asking.locked() or self.trying.locked()


class Sessions:
    """All sessions below a folder.

    The folder of a session is named by a hash of its key: no key is ever part of a path, and a list of the
    folders opens none of them.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, engine: Engine, limits: Limits, clock: Callable[[], float] = time.time):
        self.folder, self._engine, self._limits, self._clock = folder / FOLDERS, engine, limits, clock
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def new(self) -> Session:
        """A session with an empty library. Raises Refused if there are too many, or the disk is full."""
        self.sweep()
        if sum(1 for _ in self.folder.iterdir()) >= self._limits.sessions:
            raise Refused("Too many libraries are open here: try again later.")
        self.check_room()
        return self._opened(secrets.token_hex(16), make=True)

    def get(self, key: object) -> Session:
        """The session that a key opens. Raises Refused for any other."""
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise Refused("This is no session: begin a new one.")
        return self._opened(key, make=False)

    def ensure(self, key: object) -> Session:
        """The session that a key opens, or a new one where it opens none."""
        try:
            return self.get(key)
        except Refused:
            return self.new()

    def check_room(self) -> None:
        """Raises Refused when all libraries together take what they may."""
        if self.bytes() >= self._limits.disk_bytes:
            raise Refused("The disk of this place is full: delete documents, or try again later.")

    def bytes(self) -> int:
        """Bytes of all sessions on the disk."""
        total = 0
        for folder, _, files in os.walk(self.folder):
            for name in files:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue  # removed meanwhile
        return total

    def sweep(self) -> None:
        """Closes sessions that nobody has used for long, and removes what nobody has used for longer."""
        now = self._clock()
        with self._lock:
            for name, session in list(self._open.items()):
                if now - session.used > self._limits.idle_seconds and not session.busy:
                    del self._open[name]
            for folder in list(self.folder.iterdir()):
                if folder.name not in self._open and now - _used(folder) > self._limits.keep_seconds:
                    shutil.rmtree(folder, ignore_errors=True)

    @property
    def open(self) -> int:
        """Sessions that are held in memory."""
        return len(self._open)

    def close(self) -> None:
        """Stops what runs for anyone."""
        with self._lock:
            for session in self._open.values():
                session.library.cancel()
                session.end_answer()
                session.end_trial()

    def _opened(self, key: str, make: bool) -> Session:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        with self._lock:
            session, now = self._open.get(name), self._clock()
            if session is None:
                folder = self.folder / name
                if not make and not folder.is_dir():
                    raise Refused("This session has ended, and its library is gone: begin a new one.")
                folder.mkdir(mode=0o700, exist_ok=True)
                shutil.rmtree(folder / "incoming", ignore_errors=True)  # of a process that was killed
                session = Session(key, folder, self._engine, self._limits, self._clock)
                self._open[name] = session
            session.used = now
            used = session.folder / USED
            used.touch()
            os.utime(used, (now, now))
            return session


def _used(folder: Path) -> float:
    try:
        return (folder / USED).stat().st_mtime
    except FileNotFoundError:
        return folder.stat().st_mtime
