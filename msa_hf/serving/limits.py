"""What a server allows a client to take."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        concurrent: generations at once. waiting: requests that may wait for their turn, and uploads as many.
        body: bytes of a request. seconds: from the first byte of a request's body to its answer; the same
            again for a client to read it. grace: seconds that running requests get at the end.
        answer_tokens: tokens of an answer for which a request names no number.
    """

    concurrent: int = 1
    waiting: int = 64
    body: int = 16 << 20
    seconds: float = 300.0
    grace: float = 30.0
    answer_tokens: int = 128

    def __post_init__(self):
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name in ("waiting", "grace") else 1e-3
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise ValueError(f"{item.name} must be a number of at least {least:g}; got {value!r}")
