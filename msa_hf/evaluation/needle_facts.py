"""Made-up facts to hide in real texts: what they say, what is asked, and whether an answer tells them.

Names and answers are invented words or numbers that the texts around them do not hold, so that nothing but
the fact itself can answer its question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

KINDS = ("number", "place", "person")
LONGEST = "The inventor of the Strundugast drawbridge was Thrimbatham Strimbalun."  # as long as facts get
_STARTS = "Br Dr Gl Kr Kv Pl Qu Sk Str Thr Tr Vr Zel Zor".split()
_MIDDLES = "aldi avo elmo endu imba olti oru unda uvi yra".split()
_ENDS = "bek dor fen gast lun mar nix rup sov tham vin".split()
_WORD = re.compile(r"[^\W_]+")
_DIGIT_GROUPS = re.compile(r"(?<=\d)[,\u00a0\u202f](?=\d{3}(?!\d))")
_SENTENCE_START = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Fact:
    """A sentence, the question that it answers, and the answer; `kind` is one of KINDS."""

    kind: str
    sentence: str
    question: str
    answer: str


def draw_fact(kind: str, draw: random.Random, taken: Collection[str] = frozenset()) -> Fact:
    """A fact whose name and answer are none of the words `taken` (as of `words`).

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    used = set(taken)

    def new(make: Callable[[], str]) -> str:
        while (word := make()).lower() in used:
            pass
        used.add(word.lower())
        return word

    def name() -> str:
        return draw.choice(_STARTS) + draw.choice(_MIDDLES) + draw.choice(_ENDS)

    owner = new(name)
    if kind == "number":
        answer = new(lambda: str(draw.randrange(10_000, 100_000)))
        return Fact(
            kind, f"The access code of {owner} is {answer}.", f"What is the access code of {owner}?", answer
        )
    if kind == "place":
        answer = new(name)
        return Fact(
            kind, f"The ship {owner} was built in {answer}.", f"Where was the ship {owner} built?", answer
        )
    answer = f"{new(name)} {new(name)}"
    return Fact(
        kind,
        f"The inventor of the {owner} drawbridge was {answer}.",
        f"Who was the inventor of the {owner} drawbridge?",
        answer,
    )


def words(text: str) -> list[str]:
    """Words and numbers of a text in lower case, in order; "48,213" is one number."""
    return _WORD.findall(_DIGIT_GROUPS.sub("", text).lower())


def tells(reply: str, answer: str) -> bool:
    """Whether the words of `answer` stand in `reply`, next to each other and in order."""
    said, wanted = words(reply), words(answer)
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def insert(text: str, sentence: str, part: float) -> str:
    """`text` with `sentence` at the start of a sentence nearest to `part` of its length: 0 first, 1 last.

    A first line that is a title stays first.
    """
    head, newline, body = text.partition("\n")
    if not newline or not body.strip():
        head, newline, body = "", "", text
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(body)), len(body)]
    place = min(starts, key=lambda start: abs(start - part * len(body)))
    before, after = body[:place].rstrip(" "), body[place:].lstrip(" ")
    space = " " if before and not before.endswith("\n") else ""
    return f"{head}{newline}{before}{space}{sentence}{' ' if after else ''}{after}"
