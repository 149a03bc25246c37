"""`transformers serve CHECKPOINT --trust-remote-code`, the stock command, in a process without msa_hf."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from backbones import tiny_backbone
from bare_environment import ROOTS, BareEnvironment
from tiny_models import tiny_model
from transformers import AutoTokenizer, pipeline

from msa_hf import MSAForCausalLM

pytest.importorskip("transformers.cli.serving.systemone", reason="this release serves in another way")
pytest.importorskip("fastapi", reason="transformers serve needs it, and Python 3.11")
openai = pytest.importorskip("openai")

NEEDED = (*ROOTS, "accelerate", "fastapi", "uvicorn", "openai", "pydantic")
LIMIT = 300  # seconds that starting may take on a busy machine
MESSAGES = [{"role": "user", "content": "Which court heard the case, and when did it decide?"}]
CACHE = {"backend": "turboquant", "preset": "3bit", "window": 4, "block": 4, "mean_group": 8}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A checkpoint whose generation settings ask for a TurboQuantCache."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.generation_config.update(cache_implementation="quantized", cache_config=CACHE)
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """Address of the running server."""
    environment = BareEnvironment(tmp_path_factory.mktemp("bare"), NEEDED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = environment.folder / "log.txt"
    words = ["-I", "-m", "transformers.cli.transformers", "serve", folder, "--trust-remote-code"]
    with log.open("w") as file:
        process = environment.start(
            *words, "--host", "127.0.0.1", "--port", port, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            wait(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(LIMIT)


def wait(url, process, log):
    for _ in range(LIMIT * 5):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=LIMIT) as answer:
                assert json.loads(answer.read()) == {"status": "ok"}
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def expected(folder):
    """What the package answers: by the checkpoint's settings, and with an ordinary cache."""
    model, tokenizer = MSAForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    texts = []
    for options in ({}, {"cache_implementation": "dynamic", "cache_config": None}):
        out = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
        texts.append(tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def ask(url, folder, **options):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    return client.chat.completions.create(
        model=str(folder), messages=MESSAGES, max_tokens=12, temperature=0, **options
    )


def test_chat_answers_as_the_package(url, folder, expected):
    assert expected[0] != expected[1], "codes so coarse must be seen"
    answer = ask(url, folder)
    assert answer.choices[0].message.content == expected[0]
    assert answer.usage.completion_tokens == 12


def test_streamed_chat_answers_as_the_package(url, folder, expected):
    pieces = [part.choices[0].delta.content or "" for part in ask(url, folder, stream=True) if part.choices]
    assert len([piece for piece in pieces if piece]) > 1
    # A last character whose bytes have not all come is not sent.
    assert expected[0].rstrip("\ufffd") == "".join(pieces).rstrip("\ufffd")


def test_decisions_are_the_backbones(url, tiny_tokenizer):
    """What the class that serving loads is for: a probability for every option."""
    from transformers import DecisionConfig

    criteria = {"refund": "Wants the money back.", "praise": "Is content.", "other": "Anything else."}
    question = {"type": "choice", "instructions": "What is it about?", "criteria": criteria}
    asked = {"state": "I was charged twice.", "questions": {"topic": question}}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{url}/v1/systemone", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        found = json.loads(answer.read())["answers"]["topic"]
    decide = pipeline(
        "decision", model=tiny_backbone("llama"), tokenizer=tiny_tokenizer, decision_config=DecisionConfig()
    )
    assert found["probabilities"] == pytest.approx(decide(asked)["topic"]["probabilities"], abs=1e-4)
