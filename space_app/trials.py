"""Long work of the model that visitors watch, one step of it in each turn: caches side by side, needles."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_hf.documents import Document, split_document
from msa_hf.evaluation.cache_comparison import CacheAnswer, compare_caches
from msa_hf.evaluation.memory_needle import NeedleCell, NeedleProgress, needle_grid
from msa_hf.modeling.errors import MSAError
from msa_hf.modeling.sample_texts import SAMPLE_TEXTS
from msa_hf.store import MemoryStore

from .engine import Engine
from .gpu import SECONDS, lends, on_gpu
from .limits import Limits
from .refusals import Refused
from .sessions import Session

WAIT = 0.5  # seconds between looks at whether there is room
MARGIN = 20  # seconds before a lent GPU is taken back


@dataclass(frozen=True)
class Pace:
    """Seconds of a token that is cut from a text, of one that is read, of a fact; None: unknown."""

    cut: float | None = None
    read: float | None = None
    asked: float | None = None


class Trials:
    """Comparisons and needle tests of all visitors.

    Between two steps the model is free, so that a question waits for one step at most.
    """

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self._room = threading.BoundedSemaphore(limits.trials)
        self._compare, self._hide = (on_gpu(own, engine.model) for own in (self._compare_now, self._hide_now))
        self._lent = lends()
        # As in `Pace`.
        self._cut: float | None = None
        self._read: float | None = None
        self._asked: float | None = None

    @contextmanager
    def begun(self, session: Session) -> Iterator[Iterator[None]]:
        """The one trial of a session; what it gives ends once there is room for it, or it is to stop.

        Raises Refused if another one is running, or there were too many.
        """
        if not session.trying.acquire(blocking=False):
            raise Refused("A test of yours is still running: stop it, or wait until it has ended.")
        took: list[bool] = []
        try:
            session.trials.take()
            session.halt.unlink(missing_ok=True)
            yield self._waited(session.halt, took)
        finally:
            if took:
                self._room.release()
            session.halt.unlink(missing_ok=True)
            session.trying.release()

    def compare(
        self, folder: Path, question: str, tokens: int, systems: Sequence[str], stop: Path, visitor: str
    ) -> Iterator[CacheAnswer]:
        """What each cache answers from the store in `folder`; see `compare_caches`. A turn for each."""
        steps = self._compare(folder, question, tokens, tuple(systems), stop, self._deadline())
        for step, _ in self._in_turns(steps, visitor):
            yield step

    def hide(
        self,
        documents: list[Document] | None,
        lengths: Sequence[int],
        depths: int,
        seed: int,
        stop: Path,
        visitor: str,
    ) -> Iterator[NeedleProgress | NeedleCell]:
        """Cells as of `needle_grid`; documents None are real articles. A turn for each portion and cell."""
        steps = self._hide(documents, tuple(lengths), depths, seed, stop, self._deadline())
        before = 0
        # The first step cuts the texts, for which it does not need the model.
        for step, seconds in self._in_turns(steps, visitor, free=1):
            if isinstance(step, NeedleCell):
                self._asked = _smooth(self._asked, seconds)
            elif step.tokens:
                self._read = _smooth(self._read, seconds / (step.tokens - before))
                before = step.tokens
            else:
                self._cut = _smooth(self._cut, seconds / step.total)
            yield step

    @property
    def pace(self) -> Pace:
        """How fast needle tests were here so far."""
        return Pace(self._cut, self._read, self._asked)

    def measure(self) -> None:
        """Cuts and reads some sample texts, so that there is a pace before any test; not on a lent GPU."""
        if self._lent:
            return
        tokens = sum(map(self.engine.count, SAMPLE_TEXTS))
        text = Document("sample", "", "\n\n".join(SAMPLE_TEXTS))
        begin = time.perf_counter()
        split_document(text, self.limits.piece_tokens, self.engine.count)
        self._cut = (time.perf_counter() - begin) / tokens
        with self.engine.turns.of(""):
            begin = time.perf_counter()
            self.engine.model.encode_memory(list(SAMPLE_TEXTS), self.engine.tokenizer)
            self._read = (time.perf_counter() - begin) / tokens

    def _deadline(self) -> float:
        seconds = self.limits.trial_seconds
        return time.monotonic() + (min(seconds, SECONDS - MARGIN) if self._lent else seconds)

    def _waited(self, stop: Path, took: list[bool]) -> Iterator[None]:
        while not self._room.acquire(blocking=False):
            if stop.exists():
                return
            yield
            time.sleep(WAIT)
        took.append(True)

    def _in_turns(self, steps: Iterator, visitor: str, free: int = 0) -> Iterator[tuple[Any, float]]:
        """(step, its seconds), each in a turn of the visitor but for the first `free`."""
        number = 0
        while True:
            try:
                if number < free:
                    step, seconds = _next(steps)
                else:
                    with self.engine.turns.of(visitor):
                        step, seconds = _next(steps)
            except Refused:
                raise
            except (MSAError, ValueError) as error:
                text = str(error)
                raise Refused(f"{text[:1].upper()}{text[1:]}.") from error
            if step is None:
                return
            number += 1
            yield step, seconds

    def _compare_now(
        self, folder: Path, question: str, tokens: int, systems: tuple[str, ...], stop: Path, deadline: float
    ) -> Iterator[CacheAnswer]:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        stopped = _stopped(stop, deadline)
        with MemoryStore.open(folder, model, tokenizer, read_only=True) as store:
            answers = compare_caches(
                model, tokenizer, question, store, systems, context_tokens=tokens, should_stop=stopped
            )
        yield from answers

    def _hide_now(
        self,
        documents: list[Document] | None,
        lengths: tuple[int, ...],
        depths: int,
        seed: int,
        stop: Path,
        deadline: float,
    ) -> Iterator[NeedleProgress | NeedleCell]:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        stopped = _stopped(stop, deadline)
        yield from needle_grid(model, tokenizer, documents, lengths, depths, seed=seed, should_stop=stopped)


def _next(steps: Iterator) -> tuple[Any, float]:
    begin = time.perf_counter()
    step = next(steps, None)
    return step, time.perf_counter() - begin


def _stopped(stop: Path, deadline: float) -> Callable[[], bool]:
    return lambda: stop.exists() or time.monotonic() > deadline


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else (before + now) / 2
