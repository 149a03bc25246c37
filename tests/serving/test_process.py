"""The server as a process of its own: killed, ended, started wrongly."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from served import HANG, TOKEN, address, body, wait_until

from msa_hf import MemoryStore
from msa_hf.modeling.errors import MSAError
from msa_hf.serve_cli import add_serve
from msa_hf.serving.limits import Limits
from msa_hf.serving.server import bind

PROGRAM = """
import argparse, sys
from msa_hf.serve_cli import add_serve
parser = argparse.ArgumentParser()
add_serve(parser.add_subparsers())
options = parser.parse_args(["serve", *sys.argv[1:]])
options.run(options)
"""


@contextmanager
def process(checkpoint, store, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), "--store", str(store), "--port", "0", "--json"]
    root = Path(__file__).resolve().parents[2]
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
    with pytest.raises(MSAError, match=f"port {address(served)[1]}"):
        bind(*address(served))


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
