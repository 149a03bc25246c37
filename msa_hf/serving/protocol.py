"""OpenAI's chat completions as this server takes them: JSON checked into a `ChatRequest`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversation import TURNS_BEFORE, refers_back
from .errors import RequestError

RETRIEVAL_MODES = ("fused", "router", "lexical")
RETRIEVALS = ("auto", "attention", "router", "generative")

# Fields that say nothing about the answer.
_WITHOUT_EFFECT = frozenset(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier".split()
)
# Fields of abilities that a memory's answers do not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_MEMORY = ("namespaces", "where", "k", "mode", "retrieval", "rounds")


@dataclass(frozen=True)
class ChatRequest:
    """A question with what came before it, and how it is to be answered.

    Attributes:
        earlier: the turns that the question refers to, oldest first; see `conversation.refers_back`.
        max_tokens: None where the request names none. temperature: 0 is greedy.
        namespaces: None where the request names none.
    """

    model: str
    question: str
    earlier: tuple[tuple[str, str], ...] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    namespaces: tuple[str, ...] | None = None
    where: Mapping[str, Any] | None = None
    k: int | None = None
    rounds: int | None = None
    mode: str | None = None
    retrieval: str = "auto"


def parse_json(body: bytes) -> Any:
    """JSON of a request. Raises RequestError for anything else, NaN and lone surrogates included."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body must be JSON in UTF-8: {error}", None, "invalid_json") from error
    return value


def chat_request(body: Any, served: str) -> ChatRequest:
    """Raises RequestError, naming the field, for what is wrong, and for what would change the answer but is
    not supported."""
    given = _object(body, "the body")
    given = {name: value for name, value in given.items() if value is not None}
    for name, neutral in _NEUTRAL.items():
        if name in given and not _among(given.pop(name), neutral):
            rule = f"is not supported here other than as {_shown(neutral[0])}"
            _wrong(name, rule, "unsupported_parameter")
    known = _READERS.keys() | _WITHOUT_EFFECT
    for name in given:
        if name not in known:
            _wrong(name, "is not supported", "unsupported_parameter")
    for name in ("model", "messages"):
        if name not in given:
            _wrong(name, "must be given")
    fields: dict[str, Any] = {}
    for name, read in _READERS.items():
        if name in given:
            fields |= read(given[name], name)
    if fields["model"] != served:
        raise RequestError(404, f"there is no model {fields['model']!r} here", "model", "model_not_found")
    if "top_p" in fields and "temperature" not in fields:
        fields["temperature"] = 1.0  # OpenAI's default for those who sample
    return ChatRequest(**fields)


def _messages(value: Any, name: str) -> dict[str, Any]:
    """The last message is the question. Messages of a user without an answer go with the next one."""
    if not isinstance(value, list) or not value:
        _wrong(name, "must be a list of messages")
    turns: list[tuple[str, str]] = []
    asked: list[str] = []
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        message = _object(message, place)
        role, text = message.get("role"), _content(message.get("content"), f"{place}.content")
        if message.get("tool_calls") or message.get("function_call"):
            _wrong(place, "must not call tools", "unsupported_parameter")
        if role == "user":
            asked.append(text)
        elif role == "assistant":
            if asked:
                turns.append((" ".join("\n".join(asked).split()), text.strip().partition("\n")[0]))
            asked = []
        elif role in ("system", "developer"):
            rule = "instructions are not supported: an answer is given from the memory alone"
            _wrong(f"{place}.role", rule, "unsupported_parameter")
        else:
            _wrong(f"{place}.role", f"must be user or assistant; got {_shown(role)}")
    question = "\n".join(asked).strip()
    if not question:
        _wrong(name, "must end with a question of the user that is not empty")
    return {"question": question, "earlier": tuple(referred_to(question, turns))}


def referred_to(question: str, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns that a question refers to, back to one that stands alone, as in a `Conversation`."""
    found: list[tuple[str, str]] = []
    if refers_back(question):
        for asked, answer in reversed(turns[-TURNS_BEFORE:]):
            found.insert(0, (asked, answer))
            if not refers_back(asked):
                break
    return found


def _content(value: Any, name: str) -> str:
    """A text, or a list of parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        _wrong(name, "must be a text, or a list of parts of type text")
    return "\n".join(part["text"] for part in value)


def _memory(value: Any, name: str) -> dict[str, Any]:
    given = {key: own for key, own in _object(value, name).items() if own is not None}
    for key in given:
        if key not in _MEMORY:
            _wrong(f"{name}.{key}", f"is not one of {', '.join(_MEMORY)}")
    fields: dict[str, Any] = {}
    if "namespaces" in given:
        own = given["namespaces"]
        own = [own] if isinstance(own, str) else own
        if not isinstance(own, list) or not own or not all(isinstance(one, str) and one for one in own):
            _wrong(f"{name}.namespaces", "must be a list of names")
        if "*" in own and len(own) > 1:
            _wrong(f"{name}.namespaces", "must be names, or '*' alone for all")
        fields["namespaces"] = tuple(own)
    if "where" in given:
        fields["where"] = _object(given["where"], f"{name}.where")
    for key in ("k", "rounds"):
        if key in given:
            fields[key] = _integer(given[key], f"{name}.{key}", 1, 1000)
    for key, choices in (("mode", RETRIEVAL_MODES), ("retrieval", RETRIEVALS)):
        if key in given:
            if given[key] not in choices:
                _wrong(f"{name}.{key}", f"must be one of {', '.join(choices)}")
            fields[key] = given[key]
    return fields


def _stop(value: Any, name: str) -> dict[str, Any]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(one, str) and one for one in texts)
    ):
        _wrong(name, "must be a text or a list of up to 4 texts, none of them empty")
    return {"stop": tuple(texts)}


def _stream_options(value: Any, name: str) -> dict[str, Any]:
    given = _object(value, name)
    for key, own in given.items():
        if key not in ("include_usage", "include_obfuscation") or not isinstance(own, (bool, type(None))):
            _wrong(f"{name}.{key}", "must be include_usage, true or false")
    return {"include_usage": bool(given.get("include_usage"))}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        _wrong(name, f"must be a text; got {_shown(value)}")
    return value


def _truth(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        _wrong(name, f"must be true or false; got {_shown(value)}")
    return value


def _integer(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        _wrong(name, f"must be an integer from {least} to {most}; got {_shown(value)}")
    return value


def _number(value: Any, name: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        _wrong(name, f"must be a number from 0 to {most:g}; got {_shown(value)}")
    if not math.isfinite(value):
        _wrong(name, "must be finite")
    return float(value)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(name, f"must be a JSON object; got {_shown(value)}")
    return value


def _among(value: Any, choices: tuple) -> bool:
    """Whether JSON is one of some values; true is not 1 there."""
    return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in choices)


def _wrong(name: str, rule: str, code: str = "invalid_value"):
    raise RequestError(400, f"{name} {rule}", name, code)


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


_READERS = {
    "model": lambda value, name: {"model": _text(value, name)},
    "messages": _messages,
    "max_tokens": lambda value, name: {"max_tokens": _integer(value, name, 1, 1 << 20)},
    "max_completion_tokens": lambda value, name: {"max_tokens": _integer(value, name, 1, 1 << 20)},
    "temperature": lambda value, name: {"temperature": _number(value, name, 2)},
    "top_p": lambda value, name: {"top_p": _number(value, name, 1)},
    "seed": lambda value, name: {"seed": _integer(value, name, -(1 << 63), (1 << 63) - 1)},
    "stop": _stop,
    "stream": lambda value, name: {"stream": _truth(value, name)},
    "stream_options": _stream_options,
    "memory": _memory,
}
