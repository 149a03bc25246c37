"""Who may ask: bearer tokens, each for all namespaces or for some."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import RequestError


@dataclass(frozen=True)
class Access:
    """What the bearer of a token may read and write.

    Attributes:
        name: tells bearers apart. namespaces: None is all. operator: whether the token is bound to no
            namespaces, so that it may see what concerns them all.
    """

    name: str
    namespaces: tuple[str, ...] | None = None
    operator: bool = False

    def to_read(self, wanted: str | Sequence[str] | None) -> str | list[str]:
        """The namespaces of a request, "*" for all. Raises RequestError for one that is not allowed."""
        if wanted is None:
            return "default" if self.namespaces is None else list(self.namespaces)
        if wanted == "*" or list(wanted) == ["*"]:
            return "*" if self.namespaces is None else list(self.namespaces)
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            self._check(name)
        return names

    def one(self, wanted: str | None) -> str:
        """The namespace of a document. Raises RequestError if it is not allowed."""
        if wanted is None and self.namespaces is not None and "default" not in self.namespaces:
            if len(self.namespaces) != 1:
                raise RequestError(400, "namespace must be named: this token has several", "namespace")
            return self.namespaces[0]
        wanted = "default" if wanted is None else wanted
        self._check(wanted)
        return wanted

    def within(self, served: Sequence[str] | None) -> Access:
        """The same bearer where only `served` namespaces are served."""
        if served is None:
            return self
        own = served if self.namespaces is None else [name for name in self.namespaces if name in served]
        return replace(self, namespaces=tuple(own))

    def _check(self, name: str) -> None:
        if self.namespaces is not None and name not in self.namespaces:
            message = f"this token has no access to namespace {name!r}"
            raise RequestError(403, message, "namespace", "namespace_forbidden")


class Tokens:
    """The tokens of a server. They are kept as hashes, and compared in constant time.

    A file of tokens has a line for each: the token, and, where it is not for all, its namespaces:

        # TOKEN [NAMESPACE,NAMESPACE...]
        3f9c...   manuals,notes
    """

    def __init__(self, tokens: Iterable[tuple[str, Sequence[str] | None]]):
        self._known: list[tuple[bytes, Access]] = []
        for number, (token, namespaces) in enumerate(tokens, 1):
            if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError(f"token {number} must be at least 16 printable ASCII characters")
            own = None if namespaces is None else tuple(dict.fromkeys(namespaces))
            self._known.append((_hash(token), Access(f"token {number}", own, own is None)))
        if not self._known:
            raise ValueError("there must be at least one token")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokens:
        """Raises OSError if it cannot be read, ValueError for a line that is no token."""
        found: list[tuple[str, Sequence[str] | None]] = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            token, _, names = line.strip().partition(" ")
            if not token or token.startswith("#"):
                continue
            namespaces = [name.strip() for name in names.split(",") if name.strip()]
            if names.strip() and not namespaces:
                raise ValueError(f"{path}: namespaces must be names with commas between; got {names!r}")
            found.append((token, namespaces or None))
        return cls(found)

    @classmethod
    def generated(cls) -> tuple[Tokens, str]:
        """One new token for all namespaces, and what it is."""
        token = secrets.token_urlsafe(32)
        return cls([(token, None)]), token

    def access(self, header: str | None) -> Access:
        """The bearer of an Authorization header. Raises RequestError if it names no token of ours."""
        scheme, _, token = (header or "").partition(" ")
        given, found = _hash(token.strip()), None
        for known, access in self._known:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, given):
                found = access
        if found is None or scheme.lower() != "bearer":
            message = "a bearer token is needed" if not header else "the bearer token is not known"
            raise RequestError(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return found


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
