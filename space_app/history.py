"""The conversation of a session, on the disk, so that a reload of the page finds it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msa_hf.asking import Source
from msa_hf.modeling.memory_files import replace_json

FILE, MOST = "conversation.json", 40  # turns that are kept


@dataclass(frozen=True)
class Passage:
    """A passage that an answer was given from; see `asking.Source`.

    Attributes:
        piece: its number in its document, which may be a single passage, 0. per_layer: score by router layer.
    """

    document: str
    piece: int
    title: str
    round: int
    rank: int
    score: float
    router_rank: int
    router_score: float
    lexical: float | None
    per_layer: dict[str, float]
    text: str

    @classmethod
    def of(cls, source: Source) -> "Passage":
        _, mark, number = source.id.rpartition("#")
        return cls(
            document=source.source or source.id,
            piece=int(number) if number.isdigit() and mark else 0,
            title=source.title,
            round=source.round,
            rank=source.rank,
            score=source.score,
            router_rank=source.router_rank,
            router_score=source.router_score,
            lexical=source.lexical,
            per_layer={str(layer): score for layer, score in sorted(source.per_layer.items())},
            text=source.text,
        )


@dataclass(frozen=True)
class Turn:
    """A question with what became of it.

    Attributes:
        state: "waiting" for the model, "reading", "writing", "done", "stopped" by the person who asked.
        found: whether a passage shares a telling word with the question. retrieval: as it was done.
    """

    question: str
    answer: str = ""
    state: str = "waiting"
    passages: list[Passage] = field(default_factory=list)
    found: bool = True
    retrieval: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class History:
    """The last turns of a conversation, oldest first."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self.turns: list[Turn] = []
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self.turns = [
                Turn(**{**own, "passages": [Passage(**p) for p in own["passages"]]}) for own in kept
            ]

    def append(self, turn: Turn) -> None:
        self.turns = [*self.turns, turn][-MOST:]
        self._keep()

    def clear(self) -> None:
        self.turns = []
        self._keep()

    def pairs(self) -> list[tuple[str, str]]:
        """Questions with the first lines of their answers, which later questions may refer to."""
        return [
            (" ".join(own.question.split()), own.answer.partition("\n")[0])
            for own in self.turns
            if own.answer
        ]

    def _keep(self) -> None:
        replace_json(self._path, [own.to_dict() for own in self.turns], "new")
