"""The app over HTTP: its endpoints, many at once, its command, and the folder that is pushed to the Hub."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

gradio_client = pytest.importorskip("gradio_client")

from gradio_client import Client, handle_file  # noqa: E402
from hub_cases import push  # noqa: E402
from hub_server import hub_of_this_process  # noqa: E402
from space_cases import HANG, MARKUP, NILE, SEINE, awaited_client, pdf, space_model, zipped  # noqa: E402

from msa_hf import MemoryStore  # noqa: E402
from msa_hf.asking import ask as ask_plainly  # noqa: E402
from msa_hf.space_app.limits import Limits  # noqa: E402
from msa_hf.space_app.server import served  # noqa: E402
from msa_hf.space_app.space import Space  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASKERS = 20
LIMITS = Limits(file_bytes=20_000, answer_tokens=4, uploads_per_minute=1000)
ENDPOINTS = (
    "new_session add_text upload ask compare needle stop delete undo redo forget cancel documents meter "
    "history"
).split()


@pytest.fixture(scope="module")
def model():
    return space_model()


@pytest.fixture(scope="module")
def app(tmp_path_factory, model, tiny_tokenizer):
    state = tmp_path_factory.mktemp("space") / "state"
    space = Space(model, tiny_tokenizer, "tiny", state, LIMITS, portion_tokens=64)
    with served(space) as url:
        space.url = url
        yield space


@pytest.fixture(scope="module")
def client(app):
    return Client(app.url, verbose=False)


@pytest.fixture
def key(client):
    return client.predict(api_name="/new_session")


def call(client, name, *words):
    return client.predict(*words, api_name=f"/{name}")


def refused(client, name, *words):
    """The message of a request that must be refused."""
    with pytest.raises(Exception) as error:
        call(client, name, *words)
    return str(error.value)


def test_the_named_endpoints(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == sorted(f"/{name}" for name in ENDPOINTS)
    for name, endpoint in named.items():
        assert name == "/new_session" or endpoint["parameters"][0]["parameter_name"] == "session"


def test_a_library_from_beginning_to_end(client, key, tmp_path):
    added = call(client, "add_text", key, NILE, "Nile")
    assert added["documents"] == ["Nile"] and added["added_documents"] == 1
    (tmp_path / "seine.txt").write_text(SEINE)
    assert call(client, "upload", key, [handle_file(tmp_path / "seine.txt")])["documents"] == [
        "Nile",
        "seine.txt",
    ]
    reply = call(client, "ask", key, "Which river flows through Cairo?")
    assert reply["state"] == "done" and {own["document"] for own in reply["passages"]} == {
        "Nile",
        "seine.txt",
    }
    assert call(client, "delete", key, ["Nile"])["documents"] == ["seine.txt"]
    assert call(client, "undo", key)["documents"] == ["Nile", "seine.txt"]
    assert call(client, "redo", key)["documents"] == ["seine.txt"]
    assert call(client, "forget", key, ["seine.txt"])["documents"] == []
    assert call(client, "meter", key)["tokens"] == 0 and len(call(client, "history", key)) == 1


def test_a_session_sees_nothing_of_another(client, app, key):
    other = call(client, "new_session")
    call(client, "add_text", key, "My secret is under the flower pot.", "Mine")
    call(client, "add_text", other, NILE, "Theirs")
    assert [own["name"] for own in call(client, "documents", other)] == ["Theirs"]
    reply = call(client, "ask", other, "What is under the flower pot?")
    assert "secret" not in json.dumps(reply) and not reply["found"]
    assert "no document 'Mine'" in refused(client, "delete", other, ["Mine"])
    assert [own["name"] for own in call(client, "documents", key)] == ["Mine"]
    folder = app.sessions.get(key).name
    for guess in ("0" * 32, folder, f"../sessions/{folder}", key[:-1], "", key + "x"):
        for name in ("documents", "meter", "undo", "history", "cancel"):
            assert "session" in refused(client, name, guess)


def test_a_comparison_and_a_needle_test_stream_what_is_known(client, app, key):
    assert "library is empty" in refused(client, "compare", key, "Which river?")
    for number in range(9):
        call(client, "add_text", key, f"{NILE} {SEINE} Number {number}.", f"Rivers {number}")
    job = client.submit(key, "Which river flows through Cairo?", 300, api_name="/compare")
    last = job.result(HANG)
    assert last["state"] == "done" and [own["system"] for own in last["answers"]] == last["systems"]
    assert len(job.outputs()) > len(last["systems"]) and job.outputs()[0]["answers"] == []
    last = call(client, "needle", key, [500], 2, 3, "Your library")
    assert last["state"] == "done" and [own["depth"] for own in last["cells"]] == [0.0, 1.0]
    assert "from 500 to 1,000,000 tokens here; got 10" in refused(client, "needle", key, [10])
    assert call(client, "stop", key) and "no session" in refused(client, "compare", "x", "Which?")


def test_files_of_the_server_cannot_be_uploaded_or_fetched(client, app, key):
    call(client, "add_text", key, NILE, "Mine")
    store = next(app.sessions.get(key).folder.rglob("store.sqlite"))
    other = call(client, "new_session")
    for path in (store, app.state / "secret", Path("/etc/passwd")):
        given = {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.txt"}
        body = json.dumps({"data": [other, [given]]}).encode()
        request = urllib.request.Request(
            f"{app.url}gradio_api/call/upload", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=HANG) as response:
            event = json.load(response)["event_id"]
        with urllib.request.urlopen(f"{app.url}gradio_api/call/upload/{event}", timeout=HANG) as response:
            assert "event: error" in response.read().decode()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{app.url}gradio_api/file={path}", timeout=HANG)
        assert error.value.code in (403, 404)
    assert call(client, "documents", other) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.exe", b"MZ", "kind of file"),
        ("a.pdf", b"%PDF-1.4 no", "damaged"),
        ("b.pdf", pdf("x", "secret"), "encrypted"),
        ("a.txt", b"x" * 20_001, ""),
        ("a.zip", zipped({"../a.txt": b"x"}), "leads out"),
        ("b.zip", zipped({"a.txt": b"\0" * 200_000}), "at most"),
        ("b.txt", b"\0\1\2", ""),
    ],
)
def test_refused_uploads_leave_the_library_as_it_was(client, app, key, tmp_path, name, data, message):
    call(client, "add_text", key, NILE, "Nile")
    before = call(client, "documents", key), call(client, "meter", key)
    (tmp_path / name).write_bytes(data)
    assert message in refused(client, "upload", key, [handle_file(tmp_path / name)])
    assert (call(client, "documents", key), call(client, "meter", key)) == before


def test_uploaded_files_do_not_stay(client, app, key, tmp_path):
    (tmp_path / "left-behind.txt").write_text(NILE)
    call(client, "upload", key, [handle_file(tmp_path / "left-behind.txt")])
    assert not list(app.uploads.rglob("left-behind*"))


def test_markup_comes_back_as_the_text_that_it_is(client, key):
    call(client, "add_text", key, f"{MARKUP} Cairo", MARKUP)
    title = " ".join(MARKUP.split())[:100]
    [row] = call(client, "documents", key)
    assert row["title"] == title
    reply = call(client, "ask", key, f"{MARKUP} Cairo?")
    assert reply["question"] == f"{MARKUP} Cairo?"
    parts = [passage["text"].split("\n", 1) for passage in reply["passages"]]
    assert all(MARKUP.startswith(head) and part in f"{MARKUP} Cairo" for head, part in parts)
    assert any("<script>alert(1)</script>" in part for _, part in parts)


def test_twenty_askers_at_once_get_their_own_answers(client, app, model, tiny_tokenizer):
    towns = [f"Town {n} lies in Land {n}." for n in range(ASKERS)]
    keys = [call(client, "new_session") for _ in towns]
    for key, town in zip(keys, towns):
        call(client, "add_text", key, town, f"Town {town.split()[1]}")

    def asked(number):
        own = Client(app.url, verbose=False)
        return own.predict(keys[number], f"Where is Town {number}?", api_name="/ask")

    with ThreadPoolExecutor(ASKERS) as pool:
        replies = list(pool.map(asked, range(ASKERS)))
    for number, (reply, key) in enumerate(zip(replies, keys)):
        store = app.sessions.get(key).library.store
        with MemoryStore.open(store, model, tiny_tokenizer, read_only=True) as opened:
            plain = ask_plainly(
                model, tiny_tokenizer, opened.bank(), f"Where is Town {number}?", max_new_tokens=4
            )
        assert reply["question"] == f"Where is Town {number}?" and reply["answer"] == plain.answer
        assert [own["document"] for own in reply["passages"]] == [f"Town {number}"]
        assert len(call(client, "history", key)) == 1


def test_an_answer_does_not_wait_for_a_long_upload(client, app, key, monkeypatch):
    asker = call(client, "new_session")
    call(client, "add_text", asker, NILE, "Nile")
    begun, answered = threading.Event(), threading.Event()
    add, calls = app.engine.add, []

    def slow(*words):
        calls.append(words)
        if len(calls) == 3:
            begun.set()
            assert answered.wait(HANG)
        return add(*words)

    monkeypatch.setattr(app.engine, "add", slow)
    job = client.submit(key, SEINE * 20, "Long", api_name="/add_text")
    assert begun.wait(HANG)
    assert call(client, "ask", asker, "Which river?")["state"] == "done"
    assert 0 < call(client, "meter", key)["tokens"]  # what is done can be seen
    assert "being added" in refused(client, "undo", key)
    assert call(client, "cancel", key)
    answered.set()
    done = job.result(HANG)
    assert done["cancelled"] and done["documents"] == ["Long"] and len(calls) == 3


def test_the_page_finds_its_session_again(app):
    from msa_hf.space_app.page import _ensured

    ensured = _ensured(app)
    key = ensured(None)
    assert ensured(key) == key and ensured("0" * 32) != "0" * 32
    with urllib.request.urlopen(app.url, timeout=HANG) as response:
        page = response.read().decode()
    config = json.loads(urllib.request.urlopen(f"{app.url}config", timeout=HANG).read())
    assert config["analytics_enabled"] is False and "Ask your own million tokens" in page
    assert key not in page


# The command


def environment(folder, **more):
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GRADIO_TEMP_DIR")
    }
    return {**kept, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_command_serves_until_a_signal(saved, tmp_path):
    command = [sys.executable, "-m", "msa_hf.cli", "space", str(saved), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), (line, process.stderr.read() if not line else "")
        url = line.split()[-1]
        with urllib.request.urlopen(url, timeout=HANG) as response:
            assert response.status == 200
        assert list(tmp_path.glob("msa-space-*"))
        process.send_signal(signal.SIGINT)
        process.wait(HANG)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in process.stderr.read()
    assert not list(tmp_path.glob("msa-space-*"))


def test_the_command_says_what_is_missing_or_taken(saved, tmp_path, monkeypatch):
    (tmp_path / "gradio.py").write_text("raise ImportError('none here')\n")
    command = [sys.executable, "-m", "msa_hf.cli", "space", str(saved)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path, PYTHONPATH=str(tmp_path)), capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install '.[space]'" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*command, "--port", port], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
        )
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert not list(tmp_path.glob("msa-space-*"))


# On the Hub

PROGRAM = """
import sys
kept = [path for path in sys.path if path.startswith(sys.prefix) or not path.startswith(sys.argv[4])]
sys.path[:] = [sys.argv[1], *filter(None, kept)]
import app
import msa_hf, msa_hf.modeling, msa_hf.space_app, msa_hf.configs, msa_hf.kernels
for module in (app, msa_hf, msa_hf.modeling, msa_hf.space_app, msa_hf.configs, msa_hf.kernels):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
app.MODEL, app.HOST, app.PORT = sys.argv[2], "127.0.0.1", int(sys.argv[3])
app.main()
"""


def test_a_pushed_space_runs_where_the_package_is_not_installed(saved, tmp_path, monkeypatch):
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        push("space", "user/space", "--folder", ROOT / "space_app")
        files = server.files("user/space", "space")
    top = {name for name in files if "/" not in name}
    assert top - {".gitattributes"} == {"app.py", "README.md", "requirements.txt"}
    assert {"msa_hf/__init__.py", "msa_hf/modeling/modeling_msa.py", "msa_hf/space_app/page.py"} < set(files)
    assert {"msa_hf/space_app/style.css", "msa_hf/store/store.py", "msa_hf/kernels/attention.py"} < set(files)
    folder = tmp_path / "pushed"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "tmp").mkdir()
    with open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(saved), port, str(ROOT)],
            cwd=tmp_path / "tmp",
            env=environment(tmp_path / "tmp"),
            stderr=errors,
        )
    try:
        client = awaited_client(f"http://127.0.0.1:{port}/", process, tmp_path / "errors.txt")
        key = client.predict(api_name="/new_session")
        client.predict(key, NILE, "Nile", api_name="/add_text")
        assert client.predict(key, "Which river?", api_name="/ask")["passages"][0]["document"] == "Nile"
    finally:
        process.kill()
        process.wait(HANG)


def test_the_front_matter_of_the_space():
    import yaml

    _, front, _ = (ROOT / "space_app" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    pinned = (ROOT / "requirements" / "space.txt").read_text(encoding="utf-8")
    assert front["sdk"] == "gradio" and f"gradio=={front['sdk_version']}\n" in pinned
    assert (ROOT / "space_app" / front["app_file"]).is_file() and len(front["short_description"]) <= 60
    assert {"title", "python_version", "license", "tags", "models"} <= front.keys()
