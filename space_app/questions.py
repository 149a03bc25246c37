"""A question from the page or a client, until it is a turn of the conversation."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

from msa_hf.modeling.lexical import STOP_WORDS
from msa_hf.serving.generation import Answered
from msa_hf.serving.protocol import ChatRequest, referred_to

from .engine import WAYS, Engine
from .history import Passage, Turn
from .limits import Limits
from .refusals import Refused
from .sessions import Session

MOST_DOCUMENTS, MOST_ROUNDS = 8, 4
_WORD = re.compile(r"\w+")


def ask(
    engine: Engine,
    limits: Limits,
    session: Session,
    question: str,
    way: str = "",
    k: int = 0,
    rounds: int = 0,
) -> Iterator[Turn]:
    """The turn as it comes about; the last one is in the session's history, too.

    Args:
        way: one of `engine.ways`; empty is the first. k, rounds: passages and rounds at most; 0 is the usual.

    Raises Refused, with the history unchanged.
    """
    question = checked_question(question, limits)
    request = _request(engine, session, question, way, k, rounds)
    session.questions.take()
    if not session.library.rows():
        raise Refused("Your library is empty: add a document first, then ask about it.")
    with session.asking:
        session.stop.unlink(missing_ok=True)
        request = replace(request, earlier=tuple(referred_to(question, session.history.pairs())))
        begun = time.monotonic()
        turn = Turn(question)
        yield turn
        answered = None
        try:
            for item in engine.answer(session.library.store, request, session.stop, session.name):
                if isinstance(item, Answered):
                    answered = item
                elif item:
                    turn = replace(turn, answer=turn.answer + item, state="writing")
                    yield turn
        finally:
            session.stop.unlink(missing_ok=True)
        turn = replace(turn, seconds=time.monotonic() - begun, state="stopped")
        if answered is not None:
            passages = [Passage.of(source) for source in answered.sources]
            turn = replace(
                turn,
                answer=answered.text,
                state="done",
                passages=passages,
                found=any_shared(question, [own.text for own in passages]) or bool(request.earlier),
                retrieval=answered.retrieval,
            )
        session.history.append(turn)
        yield turn


def telling_words(question: str) -> set[str]:
    """The words of a question that say what it is about."""
    return {
        word
        for word in map(str.casefold, _WORD.findall(question))
        if word not in STOP_WORDS and len(word) > 1
    }


def any_shared(question: str, texts: list[str]) -> bool:
    """Whether a text has a telling word of the question; the evidence that something was found at all."""
    words = telling_words(question)
    return any(not words.isdisjoint(map(str.casefold, _WORD.findall(text))) for text in texts)


def checked_question(question: str, limits: Limits) -> str:
    """The question as it is asked. Raises Refused."""
    if not isinstance(question, str) or not question.strip():
        raise Refused("Type a question first.")
    question = question.encode("utf-8", "replace").decode().strip()
    if len(question) > limits.question_characters:
        raise Refused(
            f"The question has {len(question):,} characters; it may have {limits.question_characters:,}. "
            "Long texts belong into the library."
        )
    return question


def _request(engine: Engine, session: Session, question: str, way: str, k: int, rounds: int) -> ChatRequest:
    way = way or engine.ways[0]
    if way not in engine.ways:
        raise Refused(f"This model can be asked by: {', '.join(engine.ways)}.")
    for name, value, most in (("passages", k, MOST_DOCUMENTS), ("rounds", rounds, MOST_ROUNDS)):
        if type(value) is not int or not 0 <= value <= most:
            raise Refused(f"The number of {name} must be from 0 (the usual) to {most}.")
    retrieval, mode = WAYS[way]
    return ChatRequest(
        engine.name, question, retrieval=retrieval, mode=mode, k=k or None, rounds=rounds or None
    )
