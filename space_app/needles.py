"""A needle test from the page or a client: facts hidden at depths of texts of some lengths, and asked for."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from msa_hf.documents import Document
from msa_hf.evaluation.memory_needle import NeedleCell
from msa_hf.store import MemoryStore

from .refusals import Refused
from .sessions import Session
from .space import Space
from .trials import Pace

ARTICLES, LIBRARY = "Wikipedia articles", "Your library"
TEXTS = (ARTICLES, LIBRARY)
LENGTHS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
LEAST, MOST_LENGTHS, MOST_DEPTHS, MOST_SEED = 500, 8, 11, 1_000_000
EMPTY = "Your library is empty: add a document in the Library tab first, or hide the facts in the articles."


@dataclass(frozen=True)
class Needles:
    """A needle test as it comes about.

    Attributes:
        depths: parts of the text, 0.0 first to 1.0 last. tokens: read, of `total`, which is 0 until the texts
            are cut. state: "waiting" for other visitors' tests, "running", "done", "stopped", or "late" when
            its time is over. seconds: since its beginning; seconds_left: None while nothing is known.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    seed: int = 0
    texts: str = ARTICLES
    cells: tuple[NeedleCell, ...] = ()
    tokens: int = 0
    total: int = 0
    state: str = "waiting"
    seconds: float = 0.0
    seconds_left: float | None = None

    @property
    def all_cells(self) -> int:
        return len(self.lengths) * len(self.depths)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("seed", "texts", "tokens", "total", "state", "seconds")}
        cells = [cell.to_dict() for cell in self.cells]
        return {"lengths": list(self.lengths), "depths": list(self.depths), **own, "cells": cells}


def hide(
    space: Space, session: Session, lengths: Sequence[int], depths: int, seed: int = 0, texts: str = ARTICLES
) -> Iterator[Needles]:
    """The test after each of its steps. Raises Refused."""
    plan = planned(space, lengths, depths, seed, texts)
    documents = None
    if texts == LIBRARY:
        documents = _documents(session)
        if not documents:
            raise Refused(EMPTY)
    with space.trials.begun(session) as waiting:
        for _ in waiting:
            yield plan
        begun, state = time.monotonic(), replace(plan, state="running")
        yield state
        if not session.halt.exists():
            for step in space.trials.hide(documents, state.lengths, depths, seed, session.halt, session.name):
                if isinstance(step, NeedleCell):
                    state = replace(state, cells=(*state.cells, step))
                else:
                    state = replace(state, tokens=step.tokens, total=step.total)
                state = replace(state, seconds=time.monotonic() - begun)
                state = replace(state, seconds_left=_left(space, state))
                yield state
        done = len(state.cells) == state.all_cells
        ended = "done" if done else "stopped" if session.halt.exists() else "late"
        yield replace(state, state=ended, seconds=time.monotonic() - begun, seconds_left=None)


def planned(
    space: Space, lengths: Sequence[int], depths: int, seed: int = 0, texts: str = ARTICLES
) -> Needles:
    """The test that is to run. Raises Refused, naming what cannot be done."""
    most, cells = longest(space), space.limits.needle_cells
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise Refused("Choose at least one length.")
    for length in lengths:
        if type(length) is not int or not LEAST <= length <= most:
            raise Refused(f"A length must be from {LEAST:,} to {most:,} tokens here; got {length!r}.")
    lengths = tuple(sorted(set(lengths)))
    if len(lengths) > MOST_LENGTHS:
        raise Refused(f"A test may have {MOST_LENGTHS} lengths; got {len(lengths)}.")
    for name, value, low, high in (("Depths", depths, 1, MOST_DEPTHS), ("Seed", seed, 0, MOST_SEED)):
        if type(value) is not int or not low <= value <= high:
            raise Refused(f"{name} must be a whole number from {low} to {high:,}; got {value!r}.")
    if len(lengths) * depths > cells:
        raise Refused(
            f"A test may hide {cells} facts; {len(lengths)} lengths with {depths} depths are "
            f"{len(lengths) * depths}."
        )
    if texts not in TEXTS:
        raise Refused(f"The texts must be one of: {', '.join(TEXTS)}.")
    parts = tuple(i / (depths - 1) for i in range(depths)) if depths > 1 else (0.5,)
    return Needles(lengths, parts, seed, texts)


def longest(space: Space) -> int:
    """Tokens of the longest text that is allowed on this machine."""
    limits = space.limits
    return limits.needle_tokens if space.engine.has_gpu else limits.needle_cpu_tokens


def reading_seconds(plan: Needles, pace: Pace) -> float | None:
    """How long the texts of a test still take to be cut and read; None is not known."""
    if pace.read is None:
        return None
    left = (plan.total or plan.lengths[-1]) - plan.tokens
    return left * pace.read + (0.0 if plan.total else left * (pace.cut or 0.0))


def _left(space: Space, state: Needles) -> float | None:
    pace = space.trials.pace
    reading = reading_seconds(state, pace)
    if reading is None or pace.asked is None:
        return None
    return reading + (state.all_cells - len(state.cells)) * pace.asked


def _documents(session: Session) -> list[Document]:
    """The documents of a library, their passages joined again."""

    def name(own):
        return own.metadata.get("document", own.id)

    with MemoryStore.open(session.library.store, read_only=True) as store:
        stored = sorted(store.list(), key=lambda own: (name(own), own.metadata.get("piece", 0)))
    result = []
    for document, pieces in groupby(stored, name):
        parts = [(own.metadata.get("title", ""), own.text) for own in pieces]
        text = "\n\n".join(own.removeprefix(f"{title}\n") if title else own for title, own in parts)
        result.append(Document(document, parts[0][0].partition(" > ")[0], text))
    return result
