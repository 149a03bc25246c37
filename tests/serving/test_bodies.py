"""Bodies of requests: malformed, wrong, drawn at random, too long."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import QUESTION, body

from msa_hf.serving.errors import RequestError
from msa_hf.serving.protocol import ChatRequest, chat_request, parse_json


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


def test_other_paths_and_methods(served):
    http = served.http()
    assert http.get("/v1/other").status_code == 404 and http.get("/v1/other").json()["error"]["message"]
    assert http.get("/v1/chat/completions").status_code == 405
    for query in ("limit=0", "limit=x", "offset=-1", "limit=9999999999999999999"):
        assert http.get(f"/v1/memory/documents?{query}").status_code == 400
