"""Everything that the tabs share: the model, the sessions and the limits."""

import secrets
import shutil
import tempfile
from pathlib import Path

from .engine import Engine
from .limits import Limits
from .sessions import Sessions
from .trials import Trials

SECRET, UPLOADS = "secret", "uploads"


class Space:
    """The app without its page.

    Args:
        state: folder of all that is kept; None is a temporary one, which `close` removes.
    """

    def __init__(
        self, model, tokenizer, name: str, state: Path | None = None, limits: Limits | None = None, **options
    ):
        self.limits = limits or Limits()
        self.engine = Engine(model, tokenizer, name, self.limits, options.pop("portion_tokens", None))
        self._temporary = state is None
        self.state = Path(tempfile.mkdtemp(prefix="msa-space-")) if state is None else Path(state)
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)
        # What a process that was killed has left of uploads.
        shutil.rmtree(self.uploads, ignore_errors=True)
        self.uploads.mkdir()
        self.trials = Trials(self.engine, self.limits)
        self.sessions = Sessions(self.state, self.engine, self.limits, **options)

    @property
    def uploads(self) -> Path:
        """Where uploaded files lie until they are read."""
        return self.state / UPLOADS

    @property
    def secret(self) -> str:
        """What a browser's copy of a session's key is sealed with; it outlives the process."""
        path = self.state / SECRET
        if not path.is_file():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32), encoding="utf-8")
        return path.read_text(encoding="utf-8")

    def close(self) -> None:
        """Stops what runs, and removes what is temporary."""
        self.sessions.close()
        if self._temporary:
            shutil.rmtree(self.state, ignore_errors=True)
