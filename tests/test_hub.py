"""Pushing and fetching over a real connection: huggingface_hub against a server on 127.0.0.1."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cases import contents, filled_store, push, saved_model
from hub_server import hub_of_this_process
from huggingface_hub import constants, snapshot_download
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model
from transformers import AutoTokenizer

from msa_hf import MemoryStore, MSAForCausalLM, hub, kernel_export
from msa_hf.hub_errors import HubMissingError, PushRefusedError
from msa_hf.modeling.errors import MemoryFormatError
from msa_hf.store.errors import StoreError
from msa_hf.training.adapter import save_router_adapter

ROOT = Path(__file__).resolve().parent.parent
HUB_LIBRARY = "kernels==0.17.2"
LIMIT = 300  # seconds that a process may take on a busy machine


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), tiny_tokenizer)


@pytest.fixture
def adapter(tmp_path):
    save_router_adapter(tiny_model(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def store(tiny_tokenizer, tmp_path):
    with filled_store(tmp_path, tiny_tokenizer) as store:
        yield store


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        yield server


def python(code, server, *words, path=(ROOT,)):
    """What another process prints that uses the server as its Hub."""
    environment = os.environ | server.environment(server.folder / "home")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=server.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# What goes, and how


def test_a_model_goes_in_one_commit_and_comes_back_byte_for_byte(folder, server):
    push("model", folder, "user/model", "--message", "First model")
    repository = server.repository("user/model")
    assert repository.messages == ["initial", "First model"] and not repository.private
    sent = server.files("user/model")
    there = contents(folder)
    assert {name: sent[name] for name in there} == there
    assert set(sent) == {*there, "README.md", ".gitattributes"}
    fetched = contents(Path(snapshot_download("user/model")))
    assert fetched == sent
    lfs = {path for path, own in repository.commits[repository.branches["main"]].items() if own.lfs}
    assert lfs == {path.name for path in folder.glob("*.safetensors")}


def test_a_pushed_model_loads_as_remote_code(folder, server):
    """By commit, in a process without msa_hf: the same tokens as here."""
    commit = hub.send(hub.plan_model(folder, "user/model")).commits["main"]
    hub.send(hub.plan_model(folder, "user/model", license="mit"))
    before = len(server.requests)
    program = """
import sys
sys.modules["msa_hf"] = None  # an import of it fails
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision, documents, question = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
memory = model.encode_memory(documents, tokenizer)
out = model.generate(**tokenizer(question, return_tensors="pt"), memory=memory, max_new_tokens=8)
print(json.dumps([out[0].tolist(), model.fingerprint()]))
"""
    arguments = json.dumps(["user/model", commit, DOCUMENTS, QUESTIONS[0]])
    printed = python(program, server, arguments, path=())
    tokens, fingerprint = json.loads(printed)
    fetched = [
        own.path for own in server.requests[before:] if own.method == "GET" and "/resolve/" in own.path
    ]
    assert fetched and all(f"/resolve/{commit}/" in path for path in fetched)
    model = MSAForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    memory = model.encode_memory(DOCUMENTS, tokenizer)
    question = tokenizer(QUESTIONS[0], return_tensors="pt")
    expected = model.generate(**question, memory=memory, max_new_tokens=8)[0].tolist()
    assert (tokens, fingerprint) == (expected, model.fingerprint())


def test_a_pushed_adapter_loads_by_peft_and_transformers(folder, adapter, server):
    hub.send(hub.plan_adapter(adapter, "user/routers"))
    hub.send(hub.plan_model(folder, "user/model"))
    program = """
import torch, msa_hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

def fresh():
    model = AutoModelForCausalLM.from_pretrained("user/model")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router_" in name:
                weight.zero_()
    return model

wrapped = PeftModel.from_pretrained(fresh(), "user/routers", revision="main")
print(wrapped.base_model.model.fingerprint()["routers"])
model = fresh()
model.load_adapter("user/routers", adapter_kwargs={"revision": "main"})
print(model.fingerprint()["routers"])
"""
    assert python(program, server).split()[-2:] == [tiny_model().fingerprint()["routers"]] * 2


def test_an_adapter_tells_no_place_of_this_machine(adapter, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for place, expected in ((str(tmp_path), None), ("maker/base", "maker/base")):
        (adapter / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": place})
        )
        plan = hub.plan_adapter(adapter, "user/routers")
        [own] = [file for file in plan.files if file.path == "adapter_config.json"]
        data = own.content if isinstance(own.content, bytes) else own.content.read_bytes()
        assert json.loads(data) == settings | {"base_model_name_or_path": expected}
        assert len(data) == own.size


def test_a_memory_comes_back_byte_for_byte(store, server, tmp_path, tiny_tokenizer):
    push("memory", store.path, "user/memory", "--private", "--license", "cc0-1.0")
    assert server.repository("user/memory", "dataset").private
    model = tiny_model()
    with MemoryStore.from_hub(
        "user/memory", tmp_path / "fetched", model=model, tokenizer=tiny_tokenizer
    ) as own:
        assert own.verify() == [] and len(own) == len(store)
        for namespaces in ("default", "other"):
            mine, theirs = store.list(namespaces), own.list(namespaces)
            assert [(d.id, d.text, d.metadata) for d in mine] == [(d.id, d.text, d.metadata) for d in theirs]
        own.export_to(tmp_path / "theirs")
    store.export_to(tmp_path / "mine")
    mine, theirs = contents(tmp_path / "mine"), contents(tmp_path / "theirs")
    for name in mine.keys() - {"export.json"}:
        assert mine[name] == theirs[name] == server.files("user/memory", "dataset")[name]
    index = json.loads(server.files("user/memory", "dataset")["export.json"])
    assert index["model"] is None, "the folder of the model is nobody's business"
    assert str(tmp_path) not in str(server.files("user/memory", "dataset"))


def test_paths_of_this_machine_stay_here(store, server, tmp_path):
    places = [f"{tmp_path}/papers/old/1843.txt", f"{tmp_path}/papers/new.txt", "/papers.jsonl is no path"]
    store.add(
        ["One.", "Two.", "Three."],
        ["one", "two", "three"],
        "files",
        [{"source": places[0]}, {"source": "web", "file": places[1]}, {"title": places[2]}],
    )
    push("memory", store.path, "user/memory")
    assert str(tmp_path).encode() not in server.files("user/memory", "dataset")["documents.jsonl"]
    with MemoryStore.from_hub("user/memory", tmp_path / "fetched") as own:
        assert own.verify() == [] and own.list("default") == store.list("default")
        assert [document.metadata for document in own.list("files")] == [
            {"source": "old/1843.txt"},
            {"source": "web", "file": "new.txt"},
            {"title": places[2]},
        ]
    push("memory", store.path, "user/memory", "--keep-paths")
    with MemoryStore.from_hub("user/memory", tmp_path / "again") as own:
        assert own.get("one", "files").metadata == {"source": places[0]}


def test_namespaces_are_chosen(store, server, tmp_path):
    push("memory", store.path, "user/memory", "--namespace", "other")
    assert b"Seine" not in server.files("user/memory", "dataset")["documents.jsonl"]
    with MemoryStore.from_hub("user/memory", tmp_path / "fetched") as own:
        assert own.namespaces() == ["other"]
    with pytest.raises(PushRefusedError, match="no documents"):
        push("memory", store.path, "user/memory", "--namespace", "nobody's")


def test_kernels_lie_as_the_library_wants_them(server, tmp_path):
    push("kernels", "user/kernels")
    repository = server.repository("user/kernels", "kernel")
    assert set(repository.branches) == {"main", "v1"}
    variant = kernel_export.export_kernels(tmp_path / "here")
    fetched = contents(Path(snapshot_download("user/kernels", repo_type="kernel", revision="v1")))
    assert {f"build/torch-universal/{name}": data for name, data in contents(variant).items()} == {
        name: data for name, data in fetched.items() if name not in ("README.md", ".gitattributes")
    }
    before = dict(repository.branches)
    push("kernels", "user/kernels")
    assert repository.branches == before, "nothing has changed, so nothing is committed"


def test_pushed_kernels_load(server, tmp_path):
    """By the code of their card, through get_kernel; and a copy of them through get_local_kernel."""
    pytest.importorskip("triton", reason="triton is not installed")
    target = tmp_path / "library"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*install, "--target", target, HUB_LIBRARY, "tomlkit"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot fetch {HUB_LIBRARY}: {done.stderr.strip().splitlines()[-1]}")
    hub.send(hub.plan_kernels("user/kernels", tmp_path / "export"))
    card = server.files("user/kernels", "kernel", "v1")["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    check = """
expected = scores.topk(16)
assert torch.equal(values, expected.values) and torch.equal(documents.long(), expected.indices)
from pathlib import Path
from huggingface_hub import snapshot_download
from kernels import get_local_kernel
here = get_local_kernel(Path(snapshot_download("user/kernels", repo_type="kernel", revision="v1")))
assert here.available == msa.available and "top_documents" in here.available
"""
    python(
        "import os; os.environ.setdefault('TRITON_INTERPRET', '1')\n" + code + check, server, path=[target]
    )


def test_a_space_needs_an_app(server, tmp_path):
    folder = tmp_path / "space"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntitle: T\nsdk: gradio\n---\n")
    with pytest.raises(PushRefusedError, match=r"no app\.py"):
        push("space", "user/space", "--folder", folder)
    assert not server.requests
    (folder / "app.py").write_text("import gradio\n")
    push("space", "user/space", "--folder", folder)
    assert server.files("user/space", "space")["app.py"] == b"import gradio\n"
    (folder / "README.md").write_text("# no settings\n")
    with pytest.raises(PushRefusedError, match="settings"):
        push("space", "user/space", "--folder", folder)


def test_another_branch(folder, server):
    push("model", folder, "user/model")
    first = server.repository("user/model").branches["main"]
    push("model", folder, "user/model", "--revision", "tries/one", "--license", "mit")
    branches = server.repository("user/model").branches
    assert set(branches) == {"main", "tries/one"} and branches["main"] == first != branches["tries/one"]
    card = server.files("user/model", revision="tries/one")["README.md"].decode()
    assert '{"revision": "tries/one", "trust_remote_code": True}' in card
    again = contents(Path(snapshot_download("user/model", revision=branches["tries/one"])))
    assert again["README.md"].decode() == card


def test_shards_of_an_earlier_push_are_removed(folder, server):
    """Else a model in one file would be read instead of the shards that came later."""
    server.add(
        "user/model", {"model.safetensors": b"old", "model-00009.safetensors": b"old", "notes.txt": b"n"}
    )
    push("model", folder, "user/model")
    sent = server.files("user/model")
    assert "notes.txt" in sent and {name for name in sent if name.endswith(".safetensors")} == {
        path.name for path in folder.glob("*.safetensors")
    }


def test_the_result_as_json(folder, server, capsys):
    push("model", folder, "user/model", "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["commits"] == {"main": server.repository("user/model").branches["main"]}
    assert result["url"] == f"{server.url}/user/model" and result["kind"] == "model"


# Interruptions


def test_an_interrupted_push_goes_on_where_it_was(folder, server):
    """The process is killed while a file is sent; the next one sends what is missing, and only that."""
    program = "import sys; from msa_hf import hub; hub.send(hub.plan_model(sys.argv[1], 'user/model'))"
    environment = os.environ | server.environment(server.folder / "home") | {"PYTHONPATH": str(ROOT)}
    shards = {path: path.stat().st_size for path in folder.glob("model-*.safetensors")}
    largest = max(shards.values())
    with server.breaking(uploads=largest - 1, times=1000):  # those that are smaller arrive
        started = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=environment)
        assert server.broken.wait(LIMIT)
        server.uploaded(len(shards) - sum(size == largest for size in shards.values()), LIMIT)
        started.send_signal(signal.SIGKILL)
        started.wait(LIMIT)
    first = server.uploads()
    assert first and len(first) < len(shards)
    assert len(server.repository("user/model").messages) == 1, "nothing was committed"
    hub.send(hub.plan_model(folder, "user/model"))
    second = server.uploads()[len(first) :]
    assert not set(first) & set(second) and len(first) + len(second) == len(shards)
    sent = server.files("user/model")
    assert all(sent[path.name] == path.read_bytes() for path in shards)


def test_a_connection_that_breaks_once_is_tried_again(folder, server):
    with server.breaking(uploads=1000):
        hub.send(hub.plan_model(folder, "user/model"))
    assert server.broken.is_set()
    sent = server.files("user/model")
    assert all(sent[path.name] == path.read_bytes() for path in folder.iterdir())


def test_an_interrupted_fetch_goes_on_where_it_was(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of ten million bytes
    store.add([f"{i} of many documents. " * 8 for i in range(30)])
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"))
    with server.breaking(downloads=3000):
        with MemoryStore.from_hub("user/memory", tmp_path / "fetched") as own:
            assert own.verify() == [] and len(own) == len(store)
    assert server.broken.is_set()
    assert "bytes=3000-" in [request.range for request in server.requests]


# A memory from a stranger


def test_only_the_files_of_a_memory_are_fetched(store, server, tmp_path):
    """Nothing that a stranger puts beside a memory is fetched, let alone run."""
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"))
    files = server.files("user/memory", "dataset")
    extra = {"loader.py": b"raise SystemExit", "vectors-00000.pkl": b"x", "a/vectors-00000.safetensors": b"x"}
    server.add("user/memory", files | extra, "dataset")
    with MemoryStore.from_hub("user/memory", tmp_path / "fetched") as own:
        assert own.verify() == [] and own.model_path is None
    asked = {
        request.path.split("/resolve/")[1].split("/", 1)[1]
        for request in server.requests
        if "/resolve/" in request.path
    }
    assert asked == {"export.json", "documents.jsonl", "coding.safetensors", "vectors-00000.safetensors"}


@pytest.mark.parametrize("name", ["documents.jsonl", "coding.safetensors", "vectors-00000.safetensors"])
def test_every_hash_is_checked(store, server, tmp_path, name):
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"))
    files = server.files("user/memory", "dataset")
    data = bytearray(files[name])
    data[len(data) // 2] ^= 1
    server.add("user/memory", files | {name: bytes(data)}, "dataset")
    with pytest.raises(MemoryFormatError, match=name):
        MemoryStore.from_hub("user/memory", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    server.add("user/memory", {k: v for k, v in files.items() if k != name}, "dataset")
    with pytest.raises(MemoryFormatError, match=name):
        MemoryStore.from_hub("user/memory", tmp_path / "fetched")


def test_a_revision_is_pinned(store, server, tmp_path):
    first = hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export")).commits["main"]
    store.add(["Later."], ["later"])
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"))
    with MemoryStore.from_hub("user/memory", tmp_path / "first", revision=first) as own:
        assert len(own) == len(store) - 1
    with MemoryStore.from_hub("user/memory", tmp_path / "second") as own:
        assert len(own) == len(store)


def test_a_memory_that_was_fetched_needs_no_network(store, server, tmp_path, monkeypatch):
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"))
    MemoryStore.from_hub("user/memory", tmp_path / "first").close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with MemoryStore.from_hub("user/memory", tmp_path / "second") as own:
        assert own.verify() == [] and len(own) == len(store)


def test_a_repository_without_a_memory(server, tmp_path):
    server.add("user/data", {"data.jsonl": b"{}\n"}, "dataset")
    with pytest.raises(HubMissingError, match="holds no memory"):
        MemoryStore.from_hub("user/data", tmp_path / "fetched")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("a")
    asked = len(server.requests)
    with pytest.raises(StoreError, match="not an empty folder"):
        MemoryStore.from_hub("user/data", tmp_path / "full")
    assert len(server.requests) == asked
