"""Conversations that outlive the process: every turn is a document of the store that it reads from.

A turn is one question with its answer, in the namespace "conversation/NAME". The next question reads this
namespace beside the others, so that what was said is found, and cited, like anything else in the store.

A question that refers to what was said before ("And where was she born?") has no words to be found by. Such a
question is asked together with the turns that it refers to: they route with it and stand before it in the
prompt, as further questions with their answers.
"""

import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .asking import Reply, Source, ask, note_use
from .modeling.lexical import STOP_WORDS
from .store import MemoryStore, StoredDocument, StoreLockedError, StoreWriteError

logger = logging.getLogger(__name__)

PREFIX = "conversation/"  # of the namespaces of conversations
TURNS_BEFORE = 3  # turns at most that a question is asked with
TRIES = 20  # of half a second each, to write a turn while others write
USUAL_DOCUMENTS = 4  # that "router" retrieval reads at most, unless k says otherwise
LONGEST = 1000  # characters of a question, and of an answer, that are encoded

# Words that stand for something said before. "that" and "there" mostly do not ("the river that ...").
REFERRING = frozenset(
    "he she it they him her them his hers its their theirs this these those former latter".split()
)
_LINK = re.compile(r"(?:and|but|so|also|then|what about|how about)\b", re.I)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        id: in the namespace of its conversation. time: ISO 8601, UTC.
        sources: {"namespace", "id"} of the documents that the answer was given from.
    """

    id: str
    time: str
    question: str
    answer: str
    sources: list[dict[str, str]]

    @property
    def text(self) -> str:
        """What is encoded of it: the question as title line, then the answer."""
        return f"{' '.join(self.question.split())[:LONGEST]}\n{self.answer[:LONGEST]}"

    @property
    def metadata(self) -> dict[str, Any]:
        own = {"time": self.time, "question": self.question, "answer": self.answer, "sources": self.sources}
        return {"kind": "turn", "title": " ".join(self.question.split())[:100], "source": self.time, **own}


class Conversation:
    """Questions to a store, each remembered in it with its answer. Close it, or use it in a `with` block.

    Other conversations' turns are never read. The store is opened for writing only while a turn is written,
    so that several processes can talk at once, also in the same conversation.

    Args:
        store: folder of the store.
        name: of the conversation; one that was begun earlier goes on.
        model, tokenizer: those of the store.
        namespaces: what is read beside the conversation itself; "*" is all but other conversations.

    Raises:
        ValueError: no name, or the namespace of another conversation among `namespaces`.
        FileNotFoundError, MemoryFormatError, MemoryMismatchError: see `MemoryStore.open`.
    """

    def __init__(
        self,
        store: str | Path,
        name: str,
        model,
        tokenizer,
        namespaces: str | Sequence[str] = "default",
    ):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"name must be at least one printable character; got {name!r}")
        self.namespace = PREFIX + name.strip()
        self._others = [namespaces] if isinstance(namespaces, str) else list(namespaces)
        for other in self._others:
            if other.startswith(PREFIX) and other != self.namespace:
                raise ValueError(f"namespaces must not be another conversation; got {other!r}")
        self._folder, self._model, self._tokenizer = Path(store), model, tokenizer
        self._reader = MemoryStore.open(store, model, tokenizer, read_only=True)
        self._unwritten: list[Turn] = []

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._write()
        self._reader.close()

    def ask(self, question: str, **options) -> Reply:
        """Answers a question and remembers both. Options are those of `asking.ask`.

        If another process keeps the store from being written to for long, the turn waits for the next one.
        """
        question = question.strip()
        self._reader.refresh()
        earlier = self.referred_to(question)
        retrieval = options.get("retrieval", "auto")
        retrieval = self._model.config.retrieval if retrieval == "auto" else retrieval
        if earlier and retrieval == "router" and options.get("k") is None:
            # The turns that stand in the prompt are found as documents, too; they must not displace others.
            options["k"] = USUAL_DOCUMENTS + len(earlier)
        bank = self._reader.bank(self._namespaces()).to(self._model.device)
        reply = ask(self._model, self._tokenizer, bank, question, earlier=earlier, **options)
        self._unwritten.append(_turn(question, reply))
        self._write()
        note_use(self._folder, reply.sources, self._model, self._tokenizer)
        return reply

    def turns(self, last: int | None = None) -> list[Turn]:
        """What was said, oldest first; the last turns of it, or all."""
        self._reader.refresh()
        first = 0 if last is None else max(0, self._reader.count(self.namespace) - last)
        stored = [_read(document) for document in self._reader.list(self.namespace, offset=first)]
        turns = stored + self._unwritten
        return turns if last is None else turns[-last:]

    def referred_to(self, question: str) -> list[tuple[str, str]]:
        """Questions and answers that a question refers to, oldest first, back to one that stands alone."""
        found: list[tuple[str, str]] = []
        if refers_back(question):
            for turn in reversed(self.turns(TURNS_BEFORE)):
                found.insert(0, (" ".join(turn.question.split()), turn.answer.partition("\n")[0]))
                if not refers_back(turn.question):
                    break
        return found

    def _namespaces(self) -> list[str]:
        named = self._reader.namespaces() if "*" in self._others else self._others
        return [*(name for name in named if not name.startswith(PREFIX)), self.namespace]

    def _write(self) -> None:
        """Writes the turns that wait, if the store can be had."""
        for attempt in range(TRIES if self._unwritten else 0):
            try:
                with MemoryStore.open(self._folder, self._model, self._tokenizer) as store:
                    store.add(
                        [turn.text for turn in self._unwritten],
                        [turn.id for turn in self._unwritten],
                        self.namespace,
                        [turn.metadata for turn in self._unwritten],
                    )
                self._unwritten = []
                return
            except StoreLockedError as error:
                if attempt == TRIES - 1:
                    logger.warning("%d turns are not yet in the store: %s", len(self._unwritten), error)
            except StoreWriteError as error:
                logger.warning("%d turns are not yet in the store: %s", len(self._unwritten), error)
                return


def refers_back(question: str) -> bool:
    """Whether a question needs what was said before it to be understood.

    It does if it has a pronoun, begins as a continuation ("And ...", "What about ..."), or has fewer than two
    words that are not stop words. English only; at worst a question is routed with the last turns in vain.
    """
    words = [word.lower() for word in _WORD.findall(question)]
    telling = [word for word in words if word not in STOP_WORDS]
    return len(telling) < 2 or not REFERRING.isdisjoint(words) or _LINK.match(question.strip()) is not None


def _turn(question: str, reply: Reply) -> Turn:
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    # Two processes may talk in the same conversation at the same moment.
    return Turn(
        f"{now} {secrets.token_hex(4)}", now, question, reply.answer, [_cited(own) for own in reply.sources]
    )


def _cited(source: Source) -> dict[str, str]:
    return {"namespace": source.namespace, "id": source.id}


def _read(document: StoredDocument) -> Turn:
    """A stored turn; one that someone edited by hand may lack anything but its text."""
    question, _, answer = document.text.partition("\n")
    own = document.metadata
    kept = own.get("sources")
    return Turn(
        id=document.id,
        time=str(own.get("time", "")),
        question=str(own.get("question", question)),
        answer=str(own.get("answer", answer)),
        sources=kept if isinstance(kept, list) else [],
    )
