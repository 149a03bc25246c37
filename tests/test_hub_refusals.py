"""What a push refuses before it sends anything, what a dry run shows, and what the Hub's errors become."""

import json

import pytest
from hub_cases import contents, filled_store, push, saved_model
from hub_server import hub_of_this_process
from huggingface_hub import constants
from tiny_models import tiny_model

from msa_hf import MemoryStore, hub, outgoing
from msa_hf.card_facts import CardError
from msa_hf.hub_errors import (
    HubError,
    HubForbiddenError,
    HubMissingError,
    HubRateLimitError,
    HubTokenError,
    HubUnreachableError,
    PushRefusedError,
)
from msa_hf.modeling.errors import MSAError
from msa_hf.training.adapter import save_router_adapter

TOKEN = "hf_" + "aB3" * 12
KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA" * 4


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


@pytest.fixture
def copy(folder, tmp_path):
    """The saved model, to be changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


# What must not go


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (".env", "A=1", "name of a secret"),
        ("id_rsa", "x", "name of a secret"),
        ("server.pem", "x", "name of a secret"),
        (".ssh/config", "x", "name of a secret"),
        ("credentials.json", "{}", "name of a secret"),
        ("notes.txt", f"one\ntwo {TOKEN}\n", "a Hugging Face token in line 2"),
        ("notes.json", json.dumps({"key": KEY}), "a private key in line 1"),
        ("notes.md", KEY, "a private key in line 1"),
        ("notes.py", "key = 'AKIA" + "ABCDEFGHIJKLMNOP'", "an AWS access key"),
        ("notes.txt", "ghp_" + "a1B2" * 9, "a GitHub token"),
        ("notes.txt", "x" * ((1 << 20) - 9) + " " + TOKEN, "a Hugging Face token in line 1"),
        ("notes.txt", "\n" * (1 << 20) + "x" * 5000 + " " + TOKEN, "a Hugging Face token in line 1048577"),
        ("pytorch_model.bin", "x", "can run code"),
        ("optimizer.pt", "x", "can run code"),
        ("state.pkl", "x", "can run code"),
        ("core.exe", "x", "does not belong"),
        ("Makefile", "x", "does not belong"),
        ("extra.safetensors", "x", "cut off or no safetensors"),
    ],
)
def test_what_is_refused(copy, server, name, text, message):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(text)
    with pytest.raises(PushRefusedError, match=message) as caught:
        push("model", copy, "user/model")
    assert name in str(caught.value) and TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert not server.requests, "nothing may be sent, not even asked"


@pytest.mark.parametrize(
    "text",
    [
        "hf_model = load()",
        "-----BEGIN RSA PRIVATE KEY----- is how it begins",
        "task-" + "a" * 40,
        "AKIA is short",
    ],
)
def test_what_only_looks_like_a_secret_goes(copy, server, text):
    (copy / "notes.txt").write_text(text)
    push("model", copy, "user/model")
    assert server.files("user/model")["notes.txt"] == text.encode()


def test_documents_are_searched_for_secrets_too(store, server):
    store.add([f"My token is {TOKEN}."], ["secret"])
    with pytest.raises(PushRefusedError, match=r"documents\.jsonl holds a Hugging Face token in line 9"):
        push("memory", store.path, "user/memory")
    assert not server.requests


def test_links_to_the_outside_are_refused(copy, server, tmp_path):
    outside = tmp_path / "private.txt"
    outside.write_text("private")
    (copy / "notes.txt").symlink_to(outside)
    with pytest.raises(PushRefusedError, match="outside"):
        push("model", copy, "user/model")
    (copy / "notes.txt").unlink()
    (copy / "notes").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(PushRefusedError, match="link to a folder"):
        push("model", copy, "user/model")
    (copy / "notes").unlink()
    (copy / "inside.txt").symlink_to(copy / "config.json")
    push("model", copy, "user/model")
    assert server.files("user/model")["inside.txt"] == (copy / "config.json").read_bytes()


def test_files_over_the_limit_are_refused(copy, server, monkeypatch):
    with open(copy / "extra.safetensors", "wb") as file:
        file.truncate(outgoing.FILE_LIMIT + 1)  # takes no room on the disk
    with pytest.raises(PushRefusedError, match="50 GB"):
        push("model", copy, "user/model")
    (copy / "extra.safetensors").unlink()
    monkeypatch.setattr(outgoing, "CARD_LIMIT", 100)
    with pytest.raises(PushRefusedError, match="card is larger"):
        push("model", copy, "user/model")
    assert not server.requests


def test_incomplete_folders_are_refused(copy, adapter, server, tmp_path):
    for name, message in (
        ("tokenizer.json", "no tokenizer"),
        ("modeling_msa.py", r"lacks its code \(modeling_msa\.py\)"),
        ("model-00001-of-*.safetensors", "lacks model-00001"),
        ("config.json", r"config\.json is missing"),
    ):
        [path] = copy.glob(name)
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(MSAError, match=message):
            push("model", copy, "user/model")
        path.write_bytes(data)
    (adapter / "notes.txt").write_text("x")
    with pytest.raises(PushRefusedError, match="belongs to no router adapter"):
        push("adapter", adapter, "user/routers")
    with pytest.raises(CardError, match="no folder"):
        push("model", tmp_path / "absent", "user/model")
    with pytest.raises(FileNotFoundError, match="no store"):
        push("memory", copy, "user/memory")
    with pytest.raises(ValueError, match="USER/NAME"):
        push("model", copy, "model")
    with pytest.raises(ValueError, match="USER/NAME"):
        push("model", copy, "user/a model")
    assert not server.requests


def test_left_over_folders_of_tools_stay_here(copy, server):
    for name in (".git/config", "__pycache__/a.pyc", ".cache/huggingface/x"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(TOKEN)
    push("model", copy, "user/model")
    assert not [name for name in server.files("user/model") if "/" in name]


# A dry run


def test_a_dry_run_contacts_nothing(folder, store, adapter, server, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    push("model", folder, "user/model", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    sizes = {file["path"]: file["bytes"] for file in plan["files"]}
    assert {name: sizes.pop(name) for name in contents(folder)} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    assert sizes == {"README.md": len(plan["card"].encode())}
    lfs = {file["path"] for file in plan["files"] if file["lfs"]}
    assert lfs == {path.name for path in folder.glob("*.safetensors")}
    push("memory", store.path, "user/memory", "--dry-run")
    push("adapter", adapter, "user/routers", "--dry-run")
    push("kernels", "user/kernels", "--dry-run")
    printed = capsys.readouterr().out
    assert "documents.jsonl" in printed and "license: unknown" in printed and "# kernels" in printed
    assert printed.count("nothing was sent") == 3
    assert not server.requests and not server.repositories


# Errors


def test_a_bad_token(folder, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "nobody's")
    with pytest.raises(HubTokenError, match="does not know this token") as caught:
        push("model", folder, "user/model")
    assert "\n" not in str(caught.value) and "nobody's" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubTokenError, match="needs a token"):
        push("model", folder, "user/model")


def test_no_right_to_write(folder, server, monkeypatch):
    with pytest.raises(HubForbiddenError, match="another/model"):
        push("model", folder, "another/model")
    monkeypatch.setenv("HF_TOKEN", "reader")
    server.add("user/model", {"a.txt": b"a"})
    with pytest.raises(HubForbiddenError, match="right to write"):
        push("model", folder, "user/model")


def test_a_missing_repository_or_revision(store, server, tmp_path, monkeypatch):
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export"), private=True)
    with pytest.raises(HubMissingError, match="user/absent is not on the Hub"):
        MemoryStore.from_hub("user/absent", tmp_path / "fetched")
    with pytest.raises(HubMissingError, match="no such revision"):
        MemoryStore.from_hub("user/memory", tmp_path / "fetched", revision="absent")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubMissingError, match="may not see it"):
        MemoryStore.from_hub("user/memory", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_too_many_requests_and_a_failing_hub(folder, server):
    with server.refusing("/repos/create", 429, message="slow down", headers={"Retry-After": "30"}):
        with pytest.raises(HubRateLimitError, match="30 seconds"):
            push("model", folder, "user/model")
    with server.refusing("/repos/create", 500):
        with pytest.raises(HubUnreachableError, match=r"fails \(500\)"):
            push("model", folder, "user/model")
    with server.refusing("/commit/", 413, message="too much"):
        with pytest.raises(HubError, match=r"\(413\): too much"):
            push("model", folder, "user/model")
    push("model", folder, "user/model")


def test_offline_and_without_network(folder, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for attempt in (
        lambda: push("model", folder, "user/model"),
        lambda: MemoryStore.from_hub("user/memory", tmp_path / "fetched"),
    ):
        with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not server.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.__exit__()
    for attempt in (
        lambda: push("model", folder, "user/model"),
        lambda: MemoryStore.from_hub("user/memory", tmp_path / "fetched"),
    ):
        with pytest.raises(HubUnreachableError, match="cannot be reached"):
            attempt()


def test_a_library_that_is_too_old_for_kernels(server, monkeypatch):
    monkeypatch.setattr(constants, "REPO_TYPES_WITH_KERNEL", constants.REPO_TYPES)
    with pytest.raises(HubError, match="upgrade"):
        push("kernels", "user/kernels")
    assert not server.requests


def test_private_is_not_promised_for_a_public_repository(folder, server):
    server.add("user/model", {"a.txt": b"a"})
    with pytest.raises(PushRefusedError, match="already and public"):
        push("model", folder, "user/model", "--private")
    assert set(server.files("user/model")) == {"a.txt"}


def test_what_training_keeps_beside_an_adapter_stays_here(adapter):
    """train-router leaves the backbone's states in `features`, for later runs; nothing else is left out."""
    (adapter / "features" / "1a2b").mkdir(parents=True)
    (adapter / "features" / "1a2b" / "documents-000.npy").write_bytes(b"states")
    sent = {file.path for file in hub.plan_adapter(adapter, "me/routers").files}
    assert "adapter_model.safetensors" in sent and not any("features" in name for name in sent)
    (adapter / "states.npy").write_bytes(b"states")
    with pytest.raises(PushRefusedError, match="states.npy"):
        hub.plan_adapter(adapter, "me/routers")
