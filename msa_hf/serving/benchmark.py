"""How long the answers of a running server take, for clients that ask at once."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Measured:
    """Seconds of the requests of one run; `first_*` until the first piece of the answer."""

    clients: int
    requests: int
    failed: int
    p50: float
    p95: float
    longest: float
    first_p50: float
    first_p95: float
    requests_per_second: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    url: str, token: str, questions: Sequence[str], clients: int, requests: int, max_tokens: int
) -> Measured:
    """Streams `requests` answers to `clients` clients, each of which asks again when it has its answer.

    Raises ValueError if no request was answered; OSError if there is no server.
    """
    model = _get(url, token, "/v1/models")["data"][0]["id"]
    _ask(url, token, model, questions[0], max_tokens)  # what is done once is not measured
    took: list[tuple[float, float, int]] = []
    failures: list[str] = []
    numbers = iter(range(requests))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                one = _ask(url, token, model, questions[number % len(questions)], max_tokens)
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(str(error))
            else:
                took.append(one)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if not took:
        raise ValueError(f"no request was answered: {failures[0]}")
    whole, first = sorted(one[0] for one in took), sorted(one[1] for one in took)
    return Measured(
        clients=clients,
        requests=requests,
        failed=len(failures),
        p50=statistics.median(whole),
        p95=_percentile(whole, 0.95),
        longest=whole[-1],
        first_p50=statistics.median(first),
        first_p95=_percentile(first, 0.95),
        requests_per_second=len(took) / seconds,
        tokens_per_second=sum(one[2] for one in took) / seconds,
    )


def _ask(url: str, token: str, model: str, question: str, max_tokens: int) -> tuple[float, float, int]:
    """Seconds until the end and until the first piece, and tokens written."""
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    connection, response = _send(url, token, "POST", "/v1/chat/completions", json.dumps(asked))
    first, tokens, done = None, 0, False
    try:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    finally:
        connection.close()
    if not done:
        raise ValueError("the stream ended early")
    seconds = time.perf_counter() - start
    return seconds, seconds if first is None else first, tokens


def _get(url: str, token: str, path: str) -> Any:
    connection, response = _send(url, token, "GET", path)
    try:
        return json.loads(response.read())
    finally:
        connection.close()


def _send(url: str, token: str, method: str, path: str, body: str | None = None):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port or 80, timeout=600)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    if response.status != 200:
        text = response.read().decode(errors="replace")
        connection.close()
        raise ValueError(f"{path}: {response.status} {text[:200]}")
    return connection, response


def _percentile(values: list[float], share: float) -> float:
    """The nearest rank."""
    return values[min(len(values) - 1, int(share * len(values)))]
