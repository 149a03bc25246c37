"""The app on ZeroGPU: the real package `spaces`, a service of ours that lends GPUs, and a CPU as the GPU."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("spaces", reason="spaces is not installed")
pytest.importorskip("gradio_client")

from space_cases import HANG, NILE, SEINE, awaited_client, space_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from zerogpu_service import zerogpu_service  # noqa: E402

from msa_hf import MemoryStore  # noqa: E402
from msa_hf.asking import ask  # noqa: E402

PROGRAM = Path(__file__).with_name("zerogpu_space.py")


@pytest.fixture(scope="module")
def lender():
    with zerogpu_service() as service:
        yield service


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("zerogpu")
    space_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "cgroup").write_text("0::/space\n")
    return folder


@pytest.fixture(scope="module")
def client(folder, lender):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {
        "SPACES_ZERO_GPU": "1",
        "SPACES_ZERO_DEVICE_API_URL": lender.url,
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(folder / "cgroup"),
        "ZEROGPU_OFFLOAD_DIR": str(folder / "offload"),
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder / "model"), str(port)],
            env={**os.environ, **told},
            stdout=errors,
            stderr=errors,
            cwd=folder,
        )
    try:
        yield awaited_client(f"http://127.0.0.1:{port}/", process, folder / "errors.txt")
    finally:
        process.terminate()
        process.wait(HANG)


@pytest.fixture
def key(client):
    return client.predict(api_name="/new_session")


def test_a_visit(client, key, folder, lender, tiny_tokenizer):
    """What is read and answered in the process with the GPU is what a plain process makes of the store."""
    before = len(lender.of("/schedule"))
    for title, text in (("Nile", NILE), ("Seine", SEINE), ("Rhine", SEINE.replace("Paris", "Bonn"))):
        added = client.predict(key, text, title, api_name="/add_text")
    assert added["documents"] == ["Nile", "Seine", "Rhine"]
    question = "Which river flows through Cairo?"
    turn = client.predict(key, question, "", 2, api_name="/ask")
    assert client.predict(key, ["Nile"], api_name="/delete")["documents"] == ["Seine", "Rhine"]
    assert client.predict(key, api_name="/undo")["documents"] == added["documents"]
    asked = lender.of("/schedule")
    assert len(asked) == before + 4  # three documents and a question; the rest needs no GPU
    assert {words["durationSeconds"] for words in asked} == {"120"} and lender.of("/startup-report")

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="bfloat16").eval()
    [store] = folder.glob(f"msa-space-*/sessions/{hashlib.sha256(key.encode()).hexdigest()[:32]}/store")
    with MemoryStore.open(store, model, tiny_tokenizer, read_only=True) as opened:
        assert opened.verify() == []
        plain = ask(model, tiny_tokenizer, opened.bank(), question, k=2, max_new_tokens=96)
    assert [own["document"] for own in turn["passages"]] == [own.source for own in plain.sources]
    assert [own["router_score"] for own in turn["passages"]] == [own.router_score for own in plain.sources]
    assert turn["answer"] == plain.answer


def test_caches_and_needles(client, key):
    client.predict(key, NILE * 30, "Nile", api_name="/add_text")
    compared = client.predict(key, "Which river?", 300, api_name="/compare")
    assert compared["state"] == "done" and len(compared["answers"]) == 6
    hidden = client.predict(key, [500], 2, 0, "Your library", api_name="/needle")
    assert hidden["state"] == "done" and len(hidden["cells"]) == 2


def test_what_is_refused_in_the_process_with_the_gpu_says_why(client, key):
    client.predict(key, NILE, "Nile", api_name="/add_text")
    with pytest.raises(Exception, match="text.*has|tokens"):
        client.predict(key, [1000], 2, 0, "Your library", api_name="/needle")
    assert client.predict(key, "Which river?", api_name="/ask")["state"] == "done"
