"""Clients that go away, come in crowds, or do not come to the point, and a server that ends."""

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from served import HANG, address, body, raw, serving, wait_until

from msa_hf import MemoryStore


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(served, gate, stream):
    before = served.metric('msa_generations_total{outcome="cancelled"}')
    with socket.create_connection(address(served)) as connection:
        connection.sendall(raw(body(max_tokens=100, stream=stream)))
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
    asked = raw(body(max_tokens=100, stream=True))
    with (
        socket.create_connection(address(served)) as reads_nothing,
        socket.create_connection(address(served)) as sends_half,
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
        with socket.create_connection(address(own)) as stalls:
            stalls.sendall(raw(body())[:-5])
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
