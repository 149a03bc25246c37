"""A question to the visitor's library with every cache, until its answers stand side by side."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from msa_hf.evaluation.cache_comparison import SYSTEMS, CacheAnswer

from .questions import checked_question
from .refusals import Refused
from .sessions import Session
from .space import Space

NAMES = {
    "dense": "Dense",
    "4bit": "4 bits",
    "3bit": "3 bits",
    "2.7bit": "2.7 bits",
    "k2v2": "2 bits",
    "1.8bit": "1.8 bits",
}
LEAST, USUAL = 128, 1024  # tokens of the prompt
EMPTY = "Your library is empty: add a document in the Library tab first, then compare the answers here."


@dataclass(frozen=True)
class Comparison:
    """A comparison as it comes about.

    Attributes:
        systems: names of the caches, in their order; answers: of the first of them.
        state: "waiting" for other visitors' tests, "running", "done", "stopped", or "late" when its time is
            over.
    """

    question: str = ""
    systems: tuple[str, ...] = SYSTEMS
    answers: tuple[CacheAnswer, ...] = ()
    state: str = "waiting"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "answers": [own.to_dict() for own in self.answers]}


def compare(space: Space, session: Session, question: str, tokens: int = 0) -> Iterator[Comparison]:
    """The comparison after each of its steps.

    Args:
        tokens: up to which passages are read; 0 is the usual.

    Raises Refused.
    """
    question = checked_question(question, space.limits)
    most = space.limits.comparison_tokens
    if type(tokens) is not int or not (tokens == 0 or LEAST <= tokens <= most):
        raise Refused(
            f"The number of tokens to read must be 0 (the usual) or from {LEAST:,} to {most:,}; got {tokens}."
        )
    if not session.library.rows():
        raise Refused(EMPTY)
    with space.trials.begun(session) as waiting:
        state = Comparison(question)
        for _ in waiting:
            yield state
        state = replace(state, state="running")
        yield state
        folder, tokens = session.library.store, tokens or min(USUAL, most)
        if not session.halt.exists():
            for answer in space.trials.compare(
                folder, question, tokens, state.systems, session.halt, session.name
            ):
                state = replace(state, answers=(*state.answers, answer))
                yield state
        done = len(state.answers) == len(state.systems)
        yield replace(state, state="done" if done else "stopped" if session.halt.exists() else "late")
