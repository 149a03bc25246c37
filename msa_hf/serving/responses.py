"""OpenAI's chat completions as this server gives them, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..asking import Source
from .generation import Answered

SHOWN = ("id", "namespace", "title", "text", "score", "router_rank", "round")
DONE = b"data: [DONE]\n\n"


@dataclass
class Completion:
    """The response to one request; all its chunks have one id."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answered: Answered) -> dict[str, Any]:
        message = {"role": "assistant", "content": answered.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": answered.finish_reason,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(answered),
            "sources": _sources(answered.sources),
        }

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def last(self, answered: Answered) -> bytes:
        """The chunk with the sources."""
        return self._chunk({}, answered.finish_reason, sources=_sources(answered.sources))

    def usage(self, answered: Answered) -> bytes:
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(answered)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def models(name: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "msa_hf"}


def _usage(answered: Answered) -> dict[str, int]:
    total = answered.prompt_tokens + answered.completion_tokens
    counted = {"prompt_tokens": answered.prompt_tokens, "completion_tokens": answered.completion_tokens}
    return {**counted, "total_tokens": total}


def _sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [{name: getattr(source, name) for name in SHOWN} for source in sources]
