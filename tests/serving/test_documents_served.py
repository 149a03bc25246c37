"""Tokens, namespaces and documents over HTTP."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from served import BOUND, HANG, QUESTION, TOKEN, body, serving

from msa_hf import MemoryStore
from msa_hf.serving.tokens import Tokens


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
