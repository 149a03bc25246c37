"""One answer: generation in a thread that can be stopped, watched from the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..asking import Source, ask, with_earlier
from ..store import MemoryStore
from .answer_text import AnswerText
from .errors import RequestError, timed_out
from .protocol import ChatRequest


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Answered:
    """An answer with its sources, and the tokens that it cost."""

    text: str
    sources: list[Source]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    retrieval: str = ""


@dataclass(eq=False)
class Generation:
    """An answer in the making. `answer` runs in a thread; everything else may be called from anywhere.

    Attributes:
        reading: namespaces to read. deadline: of `time.monotonic()`. on_text: gets pieces of the answer, in
            the generating thread.
    """

    request: ChatRequest
    reading: str | list[str]
    max_tokens: int
    deadline: float
    on_text: Callable[[str], None] = lambda piece: None
    _stop: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._stop.set()

    @property
    def over(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self.deadline

    def answer(self, model, tokenizer, store: MemoryStore) -> Answered:
        """Raises Cancelled, RequestError for what the model cannot answer, and what a store raises."""
        self._check()
        request = self.request
        retrieval = model.config.retrieval if request.retrieval == "auto" else request.retrieval
        self._check_length(model, tokenizer)
        bank = store.bank(self.reading, request.where).to(model.device)
        text = AnswerText(request.stop, retrieval == "router" and model.config.answer_style == "examples")
        watch = _Watch(self, tokenizer, text, retrieval != "generative")
        with torch.random.fork_rng(enabled=request.seed is not None):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            reply = ask(
                model,
                tokenizer,
                bank,
                request.question,
                retrieval=request.retrieval,
                k=request.k,
                rounds=request.rounds,
                mode=request.mode,
                max_new_tokens=self.max_tokens,
                earlier=request.earlier,
                stopping_criteria=StoppingCriteriaList([watch]),
                **_sampling(request),
            )
        self._check()
        self.on_text(text.finish(reply.answer))
        full = watch.completion_tokens >= self.max_tokens and not text.stopped
        return Answered(
            text.shown,
            reply.sources,
            watch.prompt_tokens,
            watch.completion_tokens,
            "length" if full else "stop",
            reply.retrieval,
        )

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled
        if self.over:
            raise timed_out()

    def _check_length(self, model, tokenizer) -> None:
        """The prompt needs room for the question, the answer and something of the memory."""
        room = model.config.max_position_embeddings
        question = with_earlier(self.request.question, self.request.earlier)
        asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        if self.max_tokens > room // 2:
            rule = f"max_tokens must be at most {room // 2} for this model; got {self.max_tokens}"
            raise RequestError(400, rule, "max_tokens", "context_length_exceeded")
        if asked > room // 4:
            rule = f"the question must have at most {room // 4} tokens for this model; got {asked}"
            raise RequestError(400, rule, "messages", "context_length_exceeded")


class _Watch(StoppingCriteria):
    """Sees every token: counts it, shows what it adds, and ends a generation that nobody waits for."""

    def __init__(self, generation: Generation, tokenizer, text: AnswerText, shows: bool):
        self._generation, self._tokenizer, self._text, self._shows = generation, tokenizer, text, shows
        self.prompt_tokens = self.completion_tokens = 0
        self._length = -1

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs: Any) -> torch.BoolTensor:
        length = input_ids.shape[1]
        if length != self._length + 1:  # the first token of a round
            self.prompt_tokens = length - 1
        self._length = length
        self.completion_tokens += 1
        if self._shows:
            written = input_ids[0, self.prompt_tokens :]
            piece = self._text.advance(self._tokenizer.decode(written, skip_special_tokens=True))
            if piece:
                self._generation.on_text(piece)
        done = self._generation.over or self._text.stopped
        return torch.full((len(input_ids),), done, device=input_ids.device)


def _sampling(request: ChatRequest) -> dict[str, Any]:
    if not request.temperature:
        return {"do_sample": False}
    # No top-k: OpenAI's sampling has none.
    return {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p or 1e-6, "top_k": 0}
