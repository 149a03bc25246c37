"""A server with two small namespaces in a thread of this process, and what its tests ask it."""

import json
import threading
import time
from contextlib import contextmanager

import httpx2
import openai

from msa_hf import MemoryStore
from msa_hf.asking import ask
from msa_hf.serving.limits import Limits
from msa_hf.serving.server import bind, make_server
from msa_hf.serving.service import Service
from msa_hf.serving.tokens import Tokens

TOKEN, BOUND = "operator-token-of-the-tests", "token-for-two-namespaces"
CLIENTS = 32
HANG = 120  # seconds after which a test fails; nothing takes as long
RIVERS = [
    "Seine\nThe Seine is a river in France. It flows through Paris.",
    "Nile\nThe Nile is a river in Africa. It flows through Cairo.",
]
QUESTION = "Which river flows through Cairo?"


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


def address(served):
    host, _, port = served.url.removeprefix("http://").partition(":")
    return host, int(port)


def raw(given):
    """A request as bytes."""
    content = json.dumps(given).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
