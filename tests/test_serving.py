"""The server, over HTTP: OpenAI's own client, and clients that are slow, rude, many, or not allowed."""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from transformers import StoppingCriteria

from msa_hf import MemoryStore
from msa_hf.asking import ask
from msa_hf.modeling.errors import MSAError
from msa_hf.serve_cli import add_serve
from msa_hf.serving import generation
from msa_hf.serving.answer_text import AnswerText
from msa_hf.serving.errors import RequestError
from msa_hf.serving.limits import Limits
from msa_hf.serving.protocol import ChatRequest, chat_request, parse_json
from msa_hf.serving.server import bind, make_server
from msa_hf.serving.service import Service
from msa_hf.serving.tokens import Tokens
from msa_hf.serving.turns import Turns

TOKEN, BOUND = "operator-token-of-the-tests", "token-for-two-namespaces"
CLIENTS = 32
HANG = 120  # seconds after which a test fails; nothing takes as long
RIVERS = [
    "Seine\nThe Seine is a river in France. It flows through Paris.",
    "Nile\nThe Nile is a river in Africa. It flows through Cairo.",
]
QUESTION = "Which river flows through Cairo?"
PROGRAM = """
import argparse, sys
from msa_hf.serve_cli import add_serve
parser = argparse.ArgumentParser()
add_serve(parser.add_subparsers())
options = parser.parse_args(["serve", *sys.argv[1:]])
options.run(options)
"""


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.config.max_position_embeddings = 1024
    return model


class Served:
    """A server in a thread of this process, and what asks it."""

    def __init__(self, service):
        self.service = service
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = make_server(service)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    def http(self, token=TOKEN):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=HANG, trust_env=False)

    def openai(self, token=TOKEN):
        http = httpx2.Client(timeout=HANG, trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, http_client=http)

    def metric(self, name):
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.service.rendered_metrics().splitlines()
            if line.startswith(name)
        )

    def wait_for(self, name, value):
        wait_until(lambda: self.metric(name) >= value, f"{name} is {self.metric(name)}, not {value}")

    def stop(self):
        self.server.should_exit = True
        self.join()

    def join(self):
        self._thread.join(HANG)
        assert not self._thread.is_alive()


def wait_until(condition, message="never"):
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.01)


@contextmanager
def serving(folder, model, tokenizer, namespaces=None, **limits):
    store = MemoryStore.create(folder, model, tokenizer)
    store.add(RIVERS, ["seine", "nile"], metadata=[{"n": 1}, {"n": 2}])
    store.add(["Honey never spoils."], ["honey"], "food")
    tokens = Tokens([(TOKEN, None), (BOUND, ["food", "mine"])])
    service = Service(model, tokenizer, store, tokens, "tiny", Limits(**limits), namespaces)
    served = Served(service)
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory, model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("served") / "store"
    with serving(folder, model, tiny_tokenizer, body=1 << 16) as own:
        yield own


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, every generation stands still at its second token, unless it is told to stop."""
    opened = threading.Event()
    opened.watches = []

    class Gate(StoppingCriteria):
        def __init__(self, watch):
            self.watch = watch

        def __call__(self, input_ids, scores, **kwargs):
            while self.watch.completion_tokens > 1 and not opened.wait(0.01):
                if self.watch._generation.over:
                    break
            return self.watch(input_ids, scores, **kwargs)

    def gated(*args, stopping_criteria, **options):
        opened.watches.append(stopping_criteria[0])
        return ask(*args, stopping_criteria=[Gate(stopping_criteria[0])], **options)

    monkeypatch.setattr(generation, "ask", gated)
    yield opened
    opened.set()


def body(question=QUESTION, **more):
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 6,
        **more,
    }


def expected(served, question=QUESTION, namespaces="default", max_new_tokens=6, **options):
    service = served.service
    bank = service.store.bank(namespaces)
    return ask(service.model, service.tokenizer, bank, question, max_new_tokens=max_new_tokens, **options)


# OpenAI's client


def test_chat_is_the_answer_of_ask(served):
    reply = expected(served)
    found = served.openai().chat.completions.create(**body())
    assert found.choices[0].message.content == reply.answer
    assert [(source["id"], source["text"]) for source in found.sources] == [
        (source.id, source.text) for source in reply.sources
    ]
    assert found.object == "chat.completion" and found.model == "tiny"
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 6
    assert found.usage.total_tokens == found.usage.prompt_tokens + 6


def test_usage_counts_the_prompt_that_the_model_reads(served):
    lengths = []

    def counted(model, args, kwargs):
        lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = served.service.model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        usage = served.openai().chat.completions.create(**body()).usage
    finally:
        hook.remove()
    assert usage.prompt_tokens == lengths[0] and lengths[1:] == [1] * 5


def test_a_stream_is_the_same_answer(served):
    client = served.openai()
    whole = client.chat.completions.create(**body(max_tokens=24))
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**body(max_tokens=24, stream=True, stream_options=options)))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == whole.choices[0].message.content
    assert sum(1 for piece in pieces if piece) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].sources == whole.sources
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_memory_fields_choose_what_is_read(served):
    client = served.openai()

    def ids(**memory):
        found = client.chat.completions.create(**body(), extra_body={"memory": memory})
        return {source["id"] for source in found.sources}

    assert ids(namespaces=["food"]) == {"honey"}
    assert ids(namespaces="*") == {"seine", "nile", "honey"}
    assert ids(where={"n": 1}) == {"seine"}
    assert ids(k=1, mode="lexical") == {"nile"}
    assert ids(namespaces=["nothing"]) == set()


def test_earlier_messages_are_what_a_question_refers_to(served):
    told = [("Where is the Seine?", "In France.\nIndeed."), ("And the Nile?", "In Africa.")]
    messages = [
        {"role": role, "content": text}
        for turn in told
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    question = "And where does it flow?"
    asked = body(messages=[*messages, {"role": "user", "content": question}])
    earlier = [("Where is the Seine?", "In France."), ("And the Nile?", "In Africa.")]
    reply, alone = expected(served, question, earlier=earlier), expected(served, question)
    found = served.openai().chat.completions.create(**asked)
    assert found.choices[0].message.content == reply.answer != alone.answer


def test_sampling_is_seeded_and_stop_texts_stop(served):
    client = served.openai()
    own = body(max_tokens=24, temperature=1.5, seed=7)
    first, again = (client.chat.completions.create(**own).choices[0].message.content for _ in range(2))
    other = client.chat.completions.create(**{**own, "seed": 8}).choices[0].message.content
    greedy = client.chat.completions.create(**body(max_tokens=24)).choices[0].message.content
    assert first == again and len({first, other, greedy}) == 3
    stop = greedy[5:7]
    for stream in (False, True):
        found = client.chat.completions.create(**body(max_tokens=24, stop=stop, stream=stream))
        if stream:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert text == greedy[: greedy.index(stop)].strip() and reason == "stop"


def test_models_are_listed(served):
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(**{**body(), "model": "other"})


def test_many_clients_at_once_get_their_own(served):
    for number in range(CLIENTS):
        served.service.store.add([f"Place {number} is town {number * 7}."], ["p"], f"client-{number}")
    questions = [f"Where is place {number}?" for number in range(CLIENTS)]
    wanted = [expected(served, question, f"client-{n}").answer for n, question in enumerate(questions)]

    def one(number):
        memory = {"namespaces": [f"client-{number}"]}
        client = served.openai()
        asked = body(questions[number], stream=bool(number % 2))
        found = client.chat.completions.create(**asked, extra_body={"memory": memory})
        if not number % 2:
            return found.choices[0].message.content, found.sources
        chunks = list(found)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].sources

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(one, range(CLIENTS)))
    for number, (answer, sources) in enumerate(answers):
        assert answer == wanted[number]
        assert [source["namespace"] for source in sources] == [f"client-{number}"]


def test_generations_at_once_do_not_mix(tmp_path, model, tiny_tokenizer):
    with serving(tmp_path / "store", model, tiny_tokenizer, concurrent=4) as own:
        questions = [f"Which river is number {number}?" for number in range(8)]
        names = ["default", "food"] * 4
        wanted = [expected(own, *pair).answer for pair in zip(questions, names)]

        def one(pair):
            memory = {"namespaces": [pair[1]]}
            found = own.openai().chat.completions.create(**body(pair[0]), extra_body={"memory": memory})
            return found.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, zip(questions, names))) == wanted


# Clients that go away, or do not come to the point


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(served, gate, stream):
    before = served.metric('msa_generations_total{outcome="cancelled"}')
    with socket.create_connection(_address(served)) as connection:
        connection.sendall(_raw(body(max_tokens=100, stream=stream)))
        served.wait_for("msa_running", 1)
    served.wait_for('msa_generations_total{outcome="cancelled"}', before + 1)
    wait_until(lambda: served.metric("msa_running") == 0)
    assert gate.watches[-1].completion_tokens < 5  # of 100


def test_a_stream_that_is_aborted_ends_its_generation(served, gate):
    before = served.metric('msa_generations_total{outcome="cancelled"}')
    stream = served.openai().chat.completions.create(**body(max_tokens=100, stream=True))
    next(iter(stream))
    stream.close()
    served.wait_for('msa_generations_total{outcome="cancelled"}', before + 1)


def test_slow_clients_do_not_keep_others_waiting(served):
    asked = _raw(body(max_tokens=100, stream=True))
    with (
        socket.create_connection(_address(served)) as reads_nothing,
        socket.create_connection(_address(served)) as sends_half,
    ):
        reads_nothing.sendall(asked)
        sends_half.sendall(asked[:-10])
        assert served.openai().chat.completions.create(**body()).usage.completion_tokens == 6
        sends_half.sendall(asked[-10:])
        sends_half.settimeout(HANG)
        received = b""
        while b"[DONE]" not in received:
            received += sends_half.recv(1 << 16)


def test_a_full_queue_says_so_and_the_rest_is_answered(tmp_path, model, tiny_tokenizer, gate):
    with serving(tmp_path / "store", model, tiny_tokenizer, waiting=1) as own, ThreadPoolExecutor(2) as pool:
        running = pool.submit(own.http().post, "/v1/chat/completions", json=body())
        own.wait_for("msa_running", 1)
        waiting = pool.submit(own.http().post, "/v1/chat/completions", json=body())
        own.wait_for("msa_waiting", 1)
        for stream in (False, True):
            refused = own.http().post("/v1/chat/completions", json=body(stream=stream))
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
        assert own.http().get("/health").json() == {"status": "ok"}
        gate.set()
        assert running.result().status_code == waiting.result().status_code == 200


def test_requests_that_take_too_long_are_ended(tmp_path, model, tiny_tokenizer, gate):
    with serving(tmp_path / "store", model, tiny_tokenizer, seconds=1.0) as own:
        with ThreadPoolExecutor(2) as pool:  # one of them waits for its turn all the time
            answers = list(pool.map(lambda _: own.http().post("/v1/chat/completions", json=body()), range(2)))
        assert [answer.status_code for answer in answers] == [504, 504]
        with socket.create_connection(_address(own)) as stalls:
            stalls.sendall(_raw(body())[:-5])
            stalls.settimeout(HANG)
            assert b" 408 " in stalls.recv(1 << 12)


def test_an_end_finishes_what_runs_and_sends_the_rest_away(tmp_path, model, tiny_tokenizer, gate):
    with serving(tmp_path / "store", model, tiny_tokenizer) as own, ThreadPoolExecutor(2) as pool:
        running = pool.submit(own.http().post, "/v1/chat/completions", json=body())
        own.wait_for("msa_running", 1)
        waiting = pool.submit(own.http().post, "/v1/chat/completions", json=body())
        own.wait_for("msa_waiting", 1)
        own.server.should_exit = True
        assert waiting.result().status_code == 503
        gate.set()
        assert running.result().status_code == 200
        own.join()
        with pytest.raises(Exception, match="closed"):
            own.service.store.count()
    with MemoryStore.open(tmp_path / "store", model, tiny_tokenizer) as store:
        assert len(store) == 3 and store.verify() == []


def test_an_end_stops_what_runs_for_too_long(tmp_path, model, tiny_tokenizer, gate):
    with serving(tmp_path / "store", model, tiny_tokenizer, grace=0.0) as own, ThreadPoolExecutor(1) as pool:
        running = pool.submit(own.http().post, "/v1/chat/completions", json=body())
        own.wait_for("msa_running", 1)
        own.stop()
        assert own.metric('msa_generations_total{outcome="cancelled"}') == 1
        try:
            assert running.result().status_code >= 499
        except httpx2.HTTPError:
            pass  # the connection was closed


# Bodies


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 50_000, "JSON"),
        (b'{"model": NaN}', "JSON"),
        (b'{"model": "\\ud800"}', "JSON"),
        (b"1" * 5000, "JSON"),
        (b"[]", "object"),
        (b"{}", "model"),
    ],
)
def test_malformed_bodies_are_refused(served, content, words):
    for path in ("/v1/chat/completions", "/v1/memory/documents"):
        answer = served.http().post(path, content=content)
        assert answer.status_code == 400, answer.text
        if path.startswith("/v1/chat"):
            assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "hello", "messages"),
        ("messages", [{"role": "user", "content": " "}], "messages"),
        ("messages", [{"role": "user", "content": 3}], "messages[0].content"),
        ("messages", [{"role": "system", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "word " * 200}], "messages"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("max_tokens", 5000, "max_tokens"),
        ("max_completion_tokens", "6", "max_completion_tokens"),
        ("temperature", 3, "temperature"),
        ("temperature", 1e999, None),
        ("top_p", -1, "top_p"),
        ("seed", 1 << 80, "seed"),
        ("stop", ["", "x"], "stop"),
        ("stop", list("abcde"), "stop"),
        ("stream", "yes", "stream"),
        ("n", 2, "n"),
        ("logprobs", True, "logprobs"),
        ("tools", [{"type": "function"}], "tools"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("frequency_penalty", 1.0, "frequency_penalty"),
        ("mystery", 1, "mystery"),
        ("memory", [], "memory"),
        ("memory", {"namespaces": []}, "memory.namespaces"),
        ("memory", {"namespaces": ["*", "food"]}, "memory.namespaces"),
        ("memory", {"where": 3}, "memory.where"),
        ("memory", {"where": {"n": {"a": 1}}}, None),
        ("memory", {"k": 0}, "memory.k"),
        ("memory", {"mode": "magic"}, "memory.mode"),
        ("memory", {"colour": "red"}, "memory.colour"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_named(served, field, value, param, stream):
    content = json.dumps({**body(), "stream": stream, field: value}).replace("Infinity", "1e999")
    answer = served.http().post("/v1/chat/completions", content=content)
    if field == "memory" and param is None:
        assert answer.status_code in (200, 400)
        return
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_accepted(served):
    neutral = {"n": 1, "logprobs": False, "frequency_penalty": 0.0, "presence_penalty": 0, "tools": []}
    more = {"user": "me", "metadata": {"a": "b"}, "response_format": {"type": "text"}, "stop": None}
    answer = served.http().post("/v1/chat/completions", json=body(**neutral, **more))
    assert answer.status_code == 200, answer.text
    parts = [{"type": "text", "text": QUESTION}]
    same = served.http().post(
        "/v1/chat/completions", json=body(messages=[{"role": "user", "content": parts}])
    )
    assert same.json()["choices"] == answer.json()["choices"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "model messages max_tokens temperature top_p seed stop stream stream_options memory n tools".split()
)
DRAWN = st.one_of(
    JSON,
    st.dictionaries(FIELDS, JSON, max_size=4).map(lambda fields: {**body(), **fields}),
    st.dictionaries(st.sampled_from(["namespaces", "where", "k", "mode", "rounds"]), JSON).map(
        lambda fields: body(memory=fields)
    ),
    JSON.map(lambda value: {"documents": [{"text": "x", "metadata": value}]}),
    st.dictionaries(st.sampled_from(["id", "text", "metadata"]), JSON).map(lambda own: {"documents": [own]}),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DRAWN)
def test_any_json_is_a_request_or_an_error_that_says_why(value):
    try:
        read = chat_request(parse_json(json.dumps(value).encode()), "tiny")
    except RequestError as error:
        assert error.status in (400, 404) and str(error)
    else:
        assert isinstance(read, ChatRequest) and read.question


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=DRAWN, path=st.sampled_from(["/v1/chat/completions", "/v1/memory/documents"]))
def test_no_body_makes_the_server_fail(served, drawn_client, value, path):
    answer = drawn_client.post(path, content=json.dumps(value))
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def drawn_client(served):
    with served.http() as client:
        yield client


def test_oversized_bodies_are_refused_while_they_come(served):
    too_long = b'{"model": "' + b"x" * (1 << 16) + b'"}'

    def parts():
        for start in range(0, len(too_long), 4096):
            yield too_long[start : start + 4096]

    for content in (too_long, parts()):  # with its length said before, and without
        answer = served.http().post("/v1/chat/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    answer = served.http().post("/v1/memory/documents", content=too_long)
    assert answer.status_code == 413


# Tokens and namespaces


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", TOKEN]
)
def test_without_a_known_token_nothing_is_told(served, header):
    headers = {"Authorization": header} if header else {}
    with httpx2.Client(base_url=served.url, headers=headers, trust_env=False) as client:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("POST", "/v1/memory/documents"),
            ("GET", "/v1/memory/documents"),
            ("GET", "/v1/memory/documents/nile"),
            ("DELETE", "/v1/memory/documents/nile"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200


def test_a_bound_token_reads_and_writes_its_namespaces_only(served):
    client = served.openai(BOUND)
    found = client.chat.completions.create(**body())
    assert {source["namespace"] for source in found.sources} == {"food"}
    star = client.chat.completions.create(**body(), extra_body={"memory": {"namespaces": "*"}})
    assert {source["namespace"] for source in star.sources} == {"food"}
    for namespaces in (["default"], ["food", "default"]):
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(**body(), extra_body={"memory": {"namespaces": namespaces}})
    http, name = served.http(BOUND), "/v1/memory/documents"
    own = {"documents": [{"text": "x"}], "namespace": "default"}
    assert http.post(name, json=own).status_code == 403
    assert http.get(f"{name}/nile?namespace=default").status_code == 403
    assert http.delete(f"{name}/nile?namespace=default").status_code == 403
    assert http.get(f"{name}?namespace=default").status_code == 403
    assert http.get(f"{name}/nile?namespace=food").status_code == 404
    assert http.post(name, json={"documents": [{"text": "x"}]}).status_code == 400  # which of its two?
    assert http.get("/metrics").status_code == 403
    listed = http.get(name).json()["data"]
    assert {document["namespace"] for document in listed} == {"food"}
    assert http.post(name, json={**own, "namespace": "mine"}).status_code == 200


def test_only_named_namespaces_are_served(tmp_path, model, tiny_tokenizer):
    with serving(tmp_path / "store", model, tiny_tokenizer, namespaces=["food"]) as own:
        found = own.openai().chat.completions.create(**body())
        assert {source["namespace"] for source in found.sources} == {"food"}
        assert own.http().get("/v1/memory/documents?namespace=default").status_code == 403
        assert own.http().get("/metrics").status_code == 200


def test_a_file_of_tokens(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text(f"# who\n\n{TOKEN}\n{BOUND}  food, mine\n")
    tokens = Tokens.from_file(path)
    assert tokens.access(f"Bearer {TOKEN}").namespaces is None
    assert tokens.access(f"bearer {BOUND}").namespaces == ("food", "mine")
    for text in ("", "# nothing\n", "short\n", f"{TOKEN} ,\n"):
        path.write_text(text)
        with pytest.raises(ValueError):
            Tokens.from_file(path)


# Documents


def test_documents_are_added_listed_read_and_deleted(served):
    http, name = served.http(), "/v1/memory/documents"
    documents = [{"id": "a/b c", "text": "The key is red.", "metadata": {"n": 1}}, {"text": "Blue."}]
    added = http.post(name, json={"documents": documents, "namespace": "keys"})
    assert added.status_code == 200, added.text
    assert added.json()["ids"][0] == "a/b c" and len(added.json()["ids"][1]) == 24
    stored = served.service.store.list("keys")
    assert [document.text for document in stored] == ["The key is red.", "Blue."]
    got = http.get(f"{name}/a%2Fb%20c?namespace=keys").json()
    assert got["text"] == "The key is red." and got["metadata"] == {"n": 1}
    pages = [http.get(name, params={"namespace": "keys", "limit": 1, "offset": n}).json() for n in range(3)]
    assert [[one["text"] for one in page["data"]] for page in pages] == [["The key is red."], ["Blue."], []]
    assert [page["has_more"] for page in pages] == [True, False, False]
    assert http.post(name, json={"documents": documents, "namespace": "keys"}).status_code == 200  # the same
    other = {"documents": [{"id": "a/b c", "text": "It is green."}], "namespace": "keys"}
    assert http.post(name, json=other).status_code == 409
    assert http.post(name, json={**other, "if_exists": "update"}).status_code == 200
    found = served.openai().chat.completions.create(
        **body("Which key is green?"), extra_body={"memory": {"namespaces": ["keys"]}}
    )
    assert "It is green." in {source["text"] for source in found.sources}
    assert http.delete(f"{name}/a/b c?namespace=keys").json()["deleted"] is True
    for method in ("GET", "DELETE"):
        assert http.request(method, f"{name}/a/b c?namespace=keys").status_code == 404
    assert http.delete(f"{name}/{added.json()['ids'][1]}?namespace=keys&erase=true").status_code == 200
    assert served.service.store.was_forgotten(added.json()["ids"][1], "keys")


def test_questions_are_answered_while_documents_are_encoded(served, monkeypatch):
    begun, go_on, encode = threading.Event(), threading.Event(), type(served.service.model).encode_memory

    def slow(self, *args, **kwargs):
        begun.set()
        assert go_on.wait(HANG)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(served.service.model), "encode_memory", slow)
    own = {"documents": [{"id": "late", "text": "Late."}], "namespace": "late"}
    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(served.http().post, "/v1/memory/documents", json=own)
        try:
            assert begun.wait(HANG)
            assert served.openai().chat.completions.create(**body()).choices
            assert served.http().get("/v1/memory/documents/late?namespace=late").status_code == 404
        finally:
            go_on.set()
        assert uploading.result().status_code == 200
    assert served.http().get("/v1/memory/documents/late?namespace=late").json()["text"] == "Late."


def test_uploads_have_the_vectors_that_the_store_would_give(served, model, tiny_tokenizer, tmp_path):
    texts = ["One is a number.", "Two is a number, too.", "Three."]
    own = {"documents": [{"text": text} for text in texts], "namespace": "vectors"}
    assert served.http().post("/v1/memory/documents", json=own).status_code == 200
    with MemoryStore.create(tmp_path / "other", model, tiny_tokenizer) as other:
        ids = other.add(texts)
        assert [document.id for document in served.service.store.list("vectors")] == ids
        for question in (QUESTION, "Which number?"):
            scores = [
                model.route_questions([question], store.bank(name), tiny_tokenizer)
                for store, name in ((served.service.store, "vectors"), (other, "default"))
            ]
            assert all(scores[0][layer].equal(scores[1][layer]) for layer in scores[1])


def test_json_lines_are_uploaded(served):
    lines = "\n".join(json.dumps({"id": f"line {n}", "text": f"Line {n}."}) for n in range(3)) + "\n\n"
    headers = {"Content-Type": "application/jsonl; charset=utf-8"}
    http = served.http()
    added = http.post("/v1/memory/documents?namespace=lines", content=lines, headers=headers)
    assert added.json()["ids"] == ["line 0", "line 1", "line 2"]
    broken = http.post("/v1/memory/documents?namespace=lines", content='{"text": "x"}\n{', headers=headers)
    assert broken.status_code == 400 and "line 2" in broken.json()["error"]["message"]
    assert served.service.store.count("lines") == 3


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"documents": []},
        {"documents": "text"},
        {"documents": ["text"]},
        {"documents": [{"text": 3}]},
        {"documents": [{"text": "x", "id": 3}]},
        {"documents": [{"text": "x", "id": ""}]},
        {"documents": [{"text": "x", "metadata": []}]},
        {"documents": [{"text": "x", "colour": "red"}]},
        {"documents": [{"text": "x", "id": "same"}, {"text": "y", "id": "same"}]},
        {"documents": [{"text": "word " * 2000}]},
        {"documents": [{"text": "x"}], "namespace": "*"},
        {"documents": [{"text": "x"}], "namespace": 3},
        {"documents": [{"text": "x"}], "if_exists": "perhaps"},
        {"documents": [{"text": "x"}], "colour": "red"},
    ],
)
def test_wrong_uploads_change_nothing(served, given):
    before = served.service.store.version
    answer = served.http().post("/v1/memory/documents", json=given)
    assert answer.status_code == 400, answer.text
    assert served.service.store.version == before


def test_other_paths_and_methods(served):
    http = served.http()
    assert http.get("/v1/other").status_code == 404 and http.get("/v1/other").json()["error"]["message"]
    assert http.get("/v1/chat/completions").status_code == 405
    for query in ("limit=0", "limit=x", "offset=-1", "limit=9999999999999999999"):
        assert http.get(f"/v1/memory/documents?{query}").status_code == 400


def test_metrics_are_prometheus_text(served):
    before = served.metric('msa_requests_total{route="POST /v1/chat/completions",status="200"}')
    tokens = served.metric('msa_tokens_total{kind="completion"}')
    served.openai().chat.completions.create(**body())
    served.wait_for('msa_requests_total{route="POST /v1/chat/completions",status="200"}', before + 1)
    text = served.http().get("/metrics").text
    assert served.metric('msa_tokens_total{kind="completion"}') == tokens + 6
    assert served.metric("msa_documents ") == served.service.store.count()
    line = re.compile(r'\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.fullmatch(own) for own in text.splitlines() if not own.startswith("# ")), text
    name = 'msa_request_seconds_bucket{route="POST /v1/chat/completions",le='
    buckets = [float(own.rpartition(" ")[2]) for own in text.splitlines() if own.startswith(name)]
    count = served.metric('msa_request_seconds_count{route="POST /v1/chat/completions"}')
    assert buckets == sorted(buckets) and buckets[-1] == count > 0


# The parts that need no server


def test_turns_go_round_among_clients():
    async def play():
        turns, order = Turns(1, 10), []

        async def one(client, name):
            await turns.take(client, HANG)
            order.append(name)
            turns.give_back()

        await turns.take("a", HANG)
        waiting = [asyncio.create_task(one(client, client + n)) for client in "ab" for n in "123"]
        leaver = asyncio.create_task(one("c", "never"))
        await asyncio.sleep(0)
        assert turns.waiting == 7
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        turns.give_back()
        await asyncio.gather(*waiting)
        assert order == ["a1", "b1", "a2", "b2", "a3", "b3"]
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(play())


def test_a_turn_that_is_given_to_one_who_leaves_goes_on():
    async def play():
        turns = Turns(1, 10)
        await turns.take("a", HANG)
        leaver = asyncio.create_task(turns.take("b", HANG))
        await asyncio.sleep(0)
        turns.give_back()
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert (turns.running, turns.waiting) == (0, 0)
        await turns.take("c", HANG)
        with pytest.raises(RequestError, match="longer"):
            await turns.take("d", 0.0)
        assert turns.waiting == 0

    asyncio.run(play())


@given(
    text=st.text(st.sampled_from("ab \n\ufffd"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=3), max_size=2),
    first_line=st.booleans(),
)
def test_pieces_of_an_answer_are_the_answer(text, stops, first_line):
    shown = AnswerText(stops, first_line)
    pieces = []
    for end in range(len(text) + 1):
        pieces.append(shown.advance(text[:end]))
        if shown.stopped:
            break
    written = text[:end].strip()
    answer = written.partition("\n")[0].strip() if first_line else written
    places = [answer.find(stop) for stop in stops if stop in answer]
    pieces.append(shown.finish(answer))
    assert "".join(pieces) == shown.shown == answer[: min(places, default=len(answer))].strip()


# The process


@contextmanager
def process(checkpoint, store, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), "--store", str(store), "--port", "0", "--json"]
    root = Path(__file__).resolve().parent.parent
    running = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    )
    try:
        told = json.loads(running.stdout.readline())
        headers = {"Authorization": f"Bearer {told['token'] or TOKEN}"}
        with httpx2.Client(base_url=told["url"], headers=headers, timeout=HANG, trust_env=False) as client:
            yield running, client
    finally:
        running.kill()
        running.wait(HANG)
        running.stdout.close()


def test_nothing_acknowledged_is_lost_by_a_kill_and_sigterm_ends_in_order(tmp_path, model, tiny_tokenizer):
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    store, acknowledged = tmp_path / "store", []
    with process(tmp_path / "tiny", store) as (running, client):

        def upload():
            for number in range(100_000):
                document = {"id": f"d{number}", "text": f"Document {number}."}
                try:
                    added = client.post("/v1/memory/documents", json={"documents": [document]})
                except httpx2.HTTPError:
                    return
                assert added.status_code == 200
                acknowledged.append(document["id"])

        uploading = threading.Thread(target=upload)
        uploading.start()
        wait_until(lambda: len(acknowledged) >= 20 or not uploading.is_alive())
        running.send_signal(signal.SIGKILL)
        running.wait(HANG)
        uploading.join(HANG)
    assert len(acknowledged) >= 20
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(f"{TOKEN}\n")
    with process(tmp_path / "tiny", store, "--token-file", str(tokens)) as (running, client):
        listed = client.get("/v1/memory/documents", params={"limit": 1000}).json()["data"]
        assert set(acknowledged) <= {document["id"] for document in listed}
        with client.stream("POST", "/v1/chat/completions", json=body(max_tokens=100, stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running.wait(HANG) == 0
    with MemoryStore.open(store, model, tiny_tokenizer) as opened:
        assert opened.verify() == [] and set(acknowledged) <= {one.id for one in opened.list()}


def test_a_port_that_is_taken_says_so(served):
    with pytest.raises(MSAError, match=f"port {_address(served)[1]}"):
        bind(*_address(served))


def test_options_of_the_command(capsys):
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    options = parser.parse_args("serve model --store s --max-body 2MiB --namespace a --namespace b".split())
    assert (options.max_body, options.namespace, options.port) == (2 << 20, ["a", "b"], 8000)
    for wrong in ("--port 70000", "--max-queue -1", "--timeout 0", "--max-concurrent 0"):
        with pytest.raises(SystemExit):
            parser.parse_args(["serve", "model", "--store", "s", *wrong.split()])
    with pytest.raises(ValueError, match="waiting"):
        Limits(waiting=-1)


def _address(served):
    host, _, port = served.url.removeprefix("http://").partition(":")
    return host, int(port)


def _raw(given):
    """A request as bytes."""
    content = json.dumps(given).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
