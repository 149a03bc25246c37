"""The commands on a store, run in this process on a tiny random model: what they do, print and refuse."""

import io
import json
import sys

import pytest
from tiny_models import tiny_model

from msa_hf import model_loading, store_ingestion
from msa_hf.cli import main
from msa_hf.ingestion import ingest_into
from msa_hf.store import MemoryStore

CITIES = {"Paris": "France", "Rome": "Italy", "Oslo": "Norway", "Lima": "Peru", "Bern": "Switzerland"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(retrieval="router", max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return model_loading.load_model(str(model_folder), "cpu")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "long.md").write_text(long_text(CITIES))
    (folder / "short.txt").write_text("Honey never spoils.")
    return folder


@pytest.fixture
def store(tmp_path, model, model_folder):
    """Folder of a store with three documents in two namespaces."""
    with MemoryStore.create(tmp_path / "store", *model, model_path=str(model_folder)) as made:
        made.add(
            ["Honey never spoils.", "Gold is dense."], ["honey", "gold"], metadata=[{"n": 1}, {"n": "1"}]
        )
        made.add(["Ada wrote a program."], ["ada"], "people")
    return tmp_path / "store"


def long_text(cities):
    return "# Cities\n\n" + "\n\n".join(f"{c} lies in {n}." for c, n in cities.items())


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(out):
    return [json.loads(line) for line in out.splitlines()]


def good(capsys, *arguments):
    """What a command prints with --json, which must end well."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return rows(out)


def bad(capsys, *arguments):
    """The one line that a command says before it ends with 1."""
    code, out, err = run(capsys, *arguments)
    assert code == 1 and not out and "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("msa-hf: ")]
    return line


def contents(folder):
    with MemoryStore.open(folder, read_only=True) as opened:
        return {document.id: document.text for document in opened.list("*")}


def ingest(capsys, model_folder, store, *paths, options=()):
    return good(capsys, "ingest", model_folder, *paths, "--store", store, "--max-tokens", 40, *options)[0]


def without_models(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_loading, "load_model", fail)


# Ingestion


def test_ingest_makes_a_store_and_goes_on_for_nothing(capsys, tmp_path, model_folder, files, monkeypatch):
    folder = tmp_path / "store"
    first = ingest(capsys, model_folder, folder, files, options=["--key-bits", "dense", "--value-bits", 3])
    assert first["documents"] == 2 and first["added"] == first["pieces"] == first["documents_in_store"] == 6
    found = contents(folder)
    assert set(found) == {f"files/long.md#{n}" for n in range(1, 6)} | {"files/short.txt"}
    assert found["files/long.md#4"] == "Cities\nLima lies in Peru."
    with MemoryStore.open(folder, read_only=True) as opened:
        piece = opened.get("files/long.md#4").metadata
        assert opened.provenance.bits == {"keys": None, "values": 3, "router_keys": 4}
        assert opened.model_path == str(model_folder)
    assert piece == {
        "title": "Cities",
        "source": str(files / "long.md"),
        "document": "files/long.md",
        "piece": 4,
        "kind": "markdown",
    }
    monkeypatch.setattr(MemoryStore, "encode", lambda *a, **k: pytest.fail("encoded again"))
    again = ingest(capsys, model_folder, folder, files)
    assert again["unchanged"] == 6 and again["version"] == first["version"]


def test_ingest_updates_and_deletes_what_changed(capsys, tmp_path, model_folder, files):
    folder = tmp_path / "store"
    ingest(capsys, model_folder, folder, files)
    few = dict(list(CITIES.items())[:3]) | {"Rome": "Lazio"}
    (files / "long.md").write_text(long_text(few))
    done = ingest(capsys, model_folder, folder, files / "long.md")
    # A file that is named itself has another id than one found in a folder, but it is the same file.
    assert done["documents_in_store"] == 9
    done = ingest(capsys, model_folder, folder, files)
    assert {n: done[n] for n in ("added", "updated", "deleted", "unchanged")} == {
        "added": 0,
        "updated": 1,
        "deleted": 2,
        "unchanged": 3,
    }
    found = contents(folder)
    assert "files/long.md#4" not in found and found["files/long.md#2"] == "Cities\nRome lies in Lazio."
    (files / "long.md").write_text("# Cities\n\nNone.")
    done = ingest(capsys, model_folder, folder, files)
    assert (done["added"], done["deleted"]) == (1, 3)
    assert sorted(name for name in contents(folder) if name.startswith("files/")) == [
        "files/long.md",
        "files/short.txt",
    ]
    (files / "long.md").write_text(long_text(few))
    done = ingest(capsys, model_folder, folder, files)
    assert (done["added"], done["deleted"]) == (3, 1)


def test_an_interrupted_ingest_goes_on(capsys, tmp_path, model_folder, files, monkeypatch):
    folder, encode, encoded = tmp_path / "store", MemoryStore.encode, []

    def interrupted(self, texts, *rest, **options):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(texts)
        return encode(self, texts, *rest, **options)

    monkeypatch.setattr(store_ingestion.ingest_into, "__kwdefaults__", {**DEFAULTS, "portion_tokens": 1})
    with monkeypatch.context() as during:
        during.setattr(MemoryStore, "encode", interrupted)
        command = ["ingest", model_folder, files, "--store", folder, "--max-tokens", 40]
        assert run(capsys, *command)[0] == 130
    assert len(contents(folder)) == 2
    monkeypatch.setattr(
        MemoryStore, "encode", lambda self, t, *r, **o: encoded.append(t) or encode(self, t, *r, **o)
    )
    done = ingest(capsys, model_folder, folder, files)
    assert done["unchanged"] == 2 and done["added"] == 4
    texts = [text for own in encoded for text in own]
    assert len(texts) == len(set(texts)) == 6 and set(texts) == set(contents(folder).values())


DEFAULTS = dict(ingest_into.__kwdefaults__)


def test_same_names_from_different_places(tmp_path, model, files):
    """Two folders of one name do not overwrite each other; a folder that was moved is not read twice."""
    other = tmp_path / "other" / "files"
    other.mkdir(parents=True)
    (other / "short.txt").write_text("Wax melts.")
    with MemoryStore.create(tmp_path / "store", *model) as store:
        ingest_into(store, [files])
        for paths in ([other], [other, files], [files, other]):
            done = ingest_into(store, paths)
            assert done.added == (1 if paths == [other] else 0)
            assert store.get("files/short.txt").text == "short\nHoney never spoils."
            assert store.get("files/short.txt~2").text == "short\nWax melts."
        count = len(store)
        other.rename(tmp_path / "files2")
        (tmp_path / "files2").rename(tmp_path / "other" / "moved")
        moved = tmp_path / "moved" / "files"
        moved.parent.mkdir()
        (tmp_path / "other" / "moved").rename(moved)
        (moved / "short.txt").write_text("Wax melts slowly.")
        done = ingest_into(store, [moved])
        assert (done.updated, len(store)) == (1, count)
        assert store.get("files/short.txt~2").text == "short\nWax melts slowly."
        assert store.get("files/short.txt").text == "short\nHoney never spoils."


def test_documents_that_someone_added_are_not_overwritten(tmp_path, model, files):
    with MemoryStore.create(tmp_path / "store", *model) as store:
        store.add(["mine", "mine, too"], ["files/short.txt", "files/long.md#1"])
        ingest_into(store, [files], max_tokens=40)
        assert store.get("files/short.txt").text == "mine"
        assert store.get("files/long.md#1").text == "mine, too"
        assert store.get("files/short.txt~2").text == "short\nHoney never spoils."
        assert store.get("files/long.md~2#5").text == "Cities\nBern lies in Switzerland."
        assert len(store) == 8 and ingest_into(store, [files], max_tokens=40).unchanged == 6


def test_json_lines_keep_what_they_say(tmp_path, model):
    lines = tmp_path / "facts.jsonl"
    records = [
        {"id": "a", "text": "Wax melts.", "year": 1843, "source": "https://example.org/wax"},
        {"id": "a", "text": "Ice melts."},
        {"id": "b#1", "text": "Tin melts.", "title": "Tin"},
    ]
    lines.write_text("\n".join(map(json.dumps, records)))
    with MemoryStore.create(tmp_path / "store", *model) as store:
        ingest_into(store, [lines])
        own = {document.id: document for document in store.list()}
        assert {name: document.text for name, document in own.items()} == {
            "a": "Wax melts.",
            "a~2": "Ice melts.",
            "b#1~1": "Tin\nTin melts.",
        }
        assert own["a"].metadata["source"] == records[0]["source"] and own["a"].metadata["year"] == 1843
        assert own["a"].metadata["file"] == own["a~2"].metadata["source"] == str(lines)
        lines.write_text("\n" + lines.read_text())  # every record moves by a line
        assert ingest_into(store, [lines]).unchanged == 3
        lines.write_text('{"text": "x", "weight": NaN}')
        with pytest.raises(ValueError, match="facts.jsonl:1 cannot be stored"):
            ingest_into(store, [lines])
        refused = []
        with pytest.raises(ValueError, match="no text"):
            ingest_into(store, [lines], on_error=refused.append)
        assert len(refused) == 1


def test_texts_are_not_kept_while_a_corpus_is_read(tmp_path, model):
    """Not more than one portion waits, however many documents come."""
    lines = tmp_path / "many.jsonl"
    lines.write_text("\n".join(json.dumps({"id": str(n), "text": f"Fact {n}."}) for n in range(40)))
    with MemoryStore.create(tmp_path / "store", *model) as store:
        add, sizes = store.add, []
        store.add = lambda texts, *rest, **options: sizes.append(len(texts)) or add(texts, *rest, **options)
        ingest_into(store, [lines], portion_tokens=80)
        assert len(store) == 40 and max(sizes) <= 12 and len(sizes) >= 4  # "Fact 1." has 7 tokens
        with pytest.raises(ValueError, match="portion_tokens must be at least 1"):
            ingest_into(store, [lines], portion_tokens=0)


def test_ingest_refuses(capsys, tmp_path, model_folder, files, store):
    command = ["ingest", model_folder, files, "--store"]
    assert "does not exist" in bad(capsys, "ingest", model_folder, tmp_path / "no", "--store", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert "not an empty folder" in bad(capsys, *command, files)
    assert "key_bits 4" in bad(capsys, *command, store, "--key-bits", 2)
    assert "needs --store" in bad(
        capsys, "ingest", model_folder, files, "--out", tmp_path / "m", "--key-bits", 2
    )
    assert "goes on by itself" in bad(capsys, *command, store, "--resume")
    with MemoryStore.open(store):
        assert "open for writing" in bad(capsys, *command, store)
    for wrong in (["--key-bits", "nan"], ["--value-bits", "5"], ["--budget-bytes", "lots"], ["--out", "m"]):
        with pytest.raises(SystemExit) as stop:
            main([str(item) for item in [*command, store, *wrong]])
        assert stop.value.code == 2


def test_ingest_keeps_going(capsys, tmp_path, model_folder, files):
    (files / "broken.pdf").write_text("no pdf")
    code, _, err = run(capsys, "ingest", model_folder, files, "--store", tmp_path / "s", "--keep-going")
    assert code == 0 and "broken.pdf cannot be read" in err and len(contents(tmp_path / "s")) == 2


def test_budget(capsys, tmp_path, model_folder, files, store):
    done = ingest(
        capsys, model_folder, store, files, options=["--budget-bytes", "1.5kB", "--namespace", "files"]
    )
    assert done["added"] == 6
    found = good(capsys, "stats", store)[0]
    assert found["budget_bytes"] == 1500 and found["namespaces"] == {"default": 2, "files": 6, "people": 1}


# Editing


def test_add_and_update(capsys, tmp_path, store, monkeypatch):
    [done] = good(capsys, "add", store, "Wax melts.", "Ice melts.", "--metadata", '{"kind": "note"}')
    assert len(done["ids"]) == 2 and contents(store)[done["ids"][1]] == "Ice melts."
    (tmp_path / "note.txt").write_bytes("Café".encode("latin-1"))
    [done] = good(capsys, "add", store, "--file", tmp_path / "note.txt", "--id", "note", "--namespace", "n")
    assert done["ids"] == ["note"] and contents(store)["note"] == "Café"
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe."))
    [done] = good(capsys, "add", store, "--id", "pipe")
    assert contents(store)["pipe"] == "From a pipe."
    [done] = good(capsys, "update", store, "honey", "Honey keeps.")
    [document] = [row for row in good(capsys, "list", store) if row["id"] == "honey"]
    assert document["text"] == "Honey keeps." and document["metadata"] == {"n": 1}
    assert document["version"] == done["version"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Honey stays."))
    good(capsys, "update", store, "honey", "--metadata", "{}")
    assert contents(store)["honey"] == "Honey stays."


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["add", "STORE", ""], "must not be empty"),
        (["add", "STORE", "a", "b", "--id", "x"], "--id names one document"),
        (["add", "STORE", "other", "--id", "honey"], "exists in namespace 'default' with another content"),
        (["add", "STORE", "a", "--file", "f"], "either TEXT or --file"),
        (["add", "STORE", "--file", "/nowhere/f"], "No such file"),
        (["add", "STORE", "a", "--metadata", '{"a": NaN}'], "must be a JSON object"),
        (["add", "STORE", "a", "--namespace", "*"], "namespace must not be '*'"),
        (["add", "STORE", "x " * 2000], "max_position_embeddings"),
        (["update", "STORE", "wax", "a"], "no document 'wax'"),
        (["update", "STORE", "honey", " "], "must not be empty"),
        (["delete", "STORE", "honey", "wax"], "no document 'wax'"),
        (["forget", "STORE", "honey", "wax", "--yes"], "nothing is known of a document 'wax'"),
        (["undo", "STORE", "9"], "9 changes cannot be undone"),
        (["redo", "STORE"], "1 changes cannot be redone"),
        (["history", "STORE", "wax"], "nothing is known of a document 'wax'"),
        (["list", "STORE", "--at", "99"], "version must be a number from 1 to 3"),
        (["search", "STORE", " ", "--mode", "lexical"], "query must be a text"),
        (["import", "STORE", "/nowhere"], "no export in /nowhere"),
        (["reencode", "STORE", "/nowhere"], "no folder of a model"),
        *(
            ([command, "/nowhere/store", *rest], "no store in /nowhere/store")
            for command, *rest in (
                ["add", "a"],
                ["update", "a", "b"],
                ["delete", "a"],
                ["undo"],
                ["forget", "a"],
                ["history"],
                ["list"],
                ["search", "q"],
                ["verify"],
                ["compact"],
                ["stats"],
                ["export", "e"],
                ["reencode", "m"],
            )
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_errors_change_nothing(capsys, store, arguments, message):
    before = contents(store)
    assert message in bad(capsys, *(store if own == "STORE" else own for own in arguments))
    assert contents(store) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "s", "a", "--metadata", "{"],
        ["add", "s", "a", "--metadata", "[1]"],
        ["list", "s", "--where", "kind"],
        ["list", "s", "--limit", "0"],
        ["undo", "s", "0"],
        ["search", "s"],
        ["forget", "s"],
        ["search", "s", "q", "--mode", "best"],
        ["list", "s", "--at", "now"],
    ],
)
def test_wrong_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: msa-hf" in capsys.readouterr().err


def test_a_second_writer_is_told_so(capsys, store, model_folder):
    with MemoryStore.open(store):
        for command in (["delete", store, "honey"], ["undo", store], ["add", store, "x"], ["compact", store]):
            assert "is open for writing" in bad(capsys, *command)
        assert len(good(capsys, "list", store)) == 2


def test_the_way_back_needs_no_model(capsys, store, monkeypatch):
    without_models(monkeypatch)
    good(capsys, "delete", store, "honey", "gold")
    assert set(contents(store)) == {"ada"}
    [done] = good(capsys, "undo", store)
    assert done["added"] == 2 and set(contents(store)) == {"ada", "honey", "gold"}
    good(capsys, "undo", store, 2)
    assert contents(store) == {}
    [done] = good(capsys, "redo", store, 2)
    assert set(contents(store)) == {"ada", "honey", "gold"} and done["version"] == 7
    commits = good(capsys, "history", store)
    assert [row["kind"] for row in commits] == ["redo", "undo", "undo", "delete", "add", "add", "create"]
    assert len(good(capsys, "history", store, "--limit", 2)) == 2
    events = good(capsys, "history", store, "honey")
    assert [row["action"] for row in events][:3] == ["added", "deleted", "added"]
    assert events[0]["text"] == "Honey never spoils." and events[1]["text"] is None


def test_forget(capsys, store, monkeypatch):
    without_models(monkeypatch)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, out, err = run(capsys, "forget", store, "honey")
    assert code == 1 and not out and "nothing was erased" in err and "honey" in contents(store)
    code, _, err = run(capsys, "forget", store, "honey", "wax")
    assert code == 1 and "nothing is known of a document 'wax'" in err and "[y/N]" not in err
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    assert good(capsys, "forget", store, "honey")[0]["forgotten"] == ["honey"]
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    good(capsys, "forget", store, "gold", "--yes")
    assert set(contents(store)) == {"ada"}
    for file in store.rglob("*"):
        assert not file.is_file() or b"spoils" not in file.read_bytes()
    assert "was erased with all its history" in bad(capsys, "history", store, "honey")
    assert "cannot be undone" in bad(capsys, "undo", store)


# Reading


def test_list(capsys, store, monkeypatch):
    without_models(monkeypatch)
    assert [row["id"] for row in good(capsys, "list", store)] == ["honey", "gold"]
    everything = good(capsys, "list", store, "--namespace", "*")
    assert [row["id"] for row in everything] == ["honey", "gold", "ada"]
    chosen = good(capsys, "list", store, "--namespace", "people", "--namespace", "default")
    assert [row["id"] for row in chosen] == ["honey", "gold", "ada"]
    assert good(capsys, "list", store, "--namespace", "nobody") == []
    assert len(good(capsys, "list", store, "--where", "n=1")) == 2  # the number and the text
    assert [row["id"] for row in good(capsys, "list", store, "--where", 'n="1"')] == []
    assert good(capsys, "list", store, "--where", "n=2") == []
    assert len(good(capsys, "list", store, "--where", "n=2", "--where", "n=1")) == 2
    assert good(capsys, "list", store, "--where", "n=1", "--where", "m=1") == []
    assert [row["id"] for row in good(capsys, "list", store, "--namespace", "*", "--at", 2)] == [
        "honey",
        "gold",
    ]
    code, out, err = run(capsys, "list", store, "--limit", 1)
    assert code == 0 and "honey" in out and "gold" not in out and "1 of 2 documents" in err


def test_search(capsys, store, model, monkeypatch):
    with MemoryStore.open(store, *model, read_only=True) as opened:
        expected = [hit.to_dict() for hit in opened.search("What spoils?", 2, namespaces="*")]
    found = good(capsys, "search", store, "What spoils?", "--k", 2, "--namespace", "*")
    assert found == [{"rank": rank, **hit} for rank, hit in enumerate(expected, 1)]
    without_models(monkeypatch)
    [hit] = good(capsys, "search", store, "What spoils?", "--mode", "lexical")
    assert hit["id"] == "honey" and hit["router_rank"] is None
    assert good(capsys, "search", store, "Ada", "--mode", "lexical") == []
    assert (
        good(capsys, "search", store, "Ada", "--mode", "lexical", "--namespace", "people")[0]["id"] == "ada"
    )
    assert good(capsys, "search", store, "spoils", "--mode", "lexical", "--at", 1) == []


def test_the_model_is_never_fetched(capsys, tmp_path, model, model_folder):
    for name, known in (("a", "someone/else"), ("b", None)):
        MemoryStore.create(tmp_path / name, *model, model_path=known).close()
    assert "someone/else, which is no folder here" in bad(capsys, "search", tmp_path / "a", "q")
    assert "does not say which model" in bad(capsys, "add", tmp_path / "b", "text")
    assert good(capsys, "add", tmp_path / "b", "text", "--model", model_folder)


def test_the_model_runs_in_the_stores_precision(capsys, tmp_path, model_folder, files):
    folder = tmp_path / "store"
    ingest(capsys, model_folder, folder, files, options=["--dtype", "bfloat16"])
    assert good(capsys, "add", folder, "Wax melts.")
    ingest(capsys, model_folder, folder, files)
    assert "dtype" in bad(capsys, "add", folder, "Ice melts.", "--dtype", "float32")


def test_ask(capsys, store, model, monkeypatch):
    command = ["ask", store, "What spoils?", "--max-new-tokens", 3, "--k", 2]
    [reply] = good(capsys, *command)
    assert {(own["namespace"], own["id"]) for own in reply["sources"]} == {
        ("default", "honey"),
        ("default", "gold"),
    }
    [reply] = good(capsys, *command, "--namespace", "people")
    assert [own["id"] for own in reply["sources"]] == ["ada"] and reply["sources"][0][
        "text"
    ] == "Ada wrote a program."
    [reply] = good(capsys, *command, "--at", 2, "--namespace", "*", "--k", 4)
    assert {own["id"] for own in reply["sources"]} == {"honey", "gold"}
    code, out, _ = run(capsys, *command)
    assert code == 0 and "(default: honey)" in out
    for retrieval in ("attention", "generative"):
        [reply] = good(capsys, *command, "--retrieval", retrieval, "--rounds", 1)
        assert reply["retrieval"] == retrieval


def test_ask_counts_uses_unless_another_writes(capsys, store, monkeypatch):
    used = []
    monkeypatch.setattr(MemoryStore, "record_use", lambda self, ids, namespace: used.append((namespace, ids)))
    command = ["ask", store, "What spoils?", "--max-new-tokens", 2, "--k", 1]
    [reply] = good(capsys, *command)
    assert used == [("default", [reply["sources"][0]["id"]])]
    good(capsys, *command, "--at", 2)
    with MemoryStore.open(store):
        good(capsys, *command)
    assert len(used) == 1


def test_ask_tells_a_store_from_a_memory(capsys, tmp_path, model_folder, files):
    assert run(capsys, "ingest", model_folder, files, "--out", tmp_path / "m")[0] == 0
    for option in (["--follow", "x"], ["--namespace", "x"], ["--at", 1]):
        assert "needs a store" in bad(capsys, "ask", tmp_path / "m", "q?", *option)
    [reply] = good(capsys, "ask", tmp_path / "m", "What spoils?", "--max-new-tokens", 2)
    assert {own["namespace"] for own in reply["sources"]} == {""}
    assert "no memory in" in bad(capsys, "ask", tmp_path / "nothing", "q?")


def test_ask_follows(capsys, store):
    command = ["--max-new-tokens", 2, "--follow", "bees"]
    first, second = good(capsys, "ask", store, "What spoils?", "And why?", *command)
    assert first["earlier"] == [] and second["earlier"] == [
        ["What spoils?", first["answer"].partition("\n")[0]]
    ]
    turns = good(capsys, "list", store, "--namespace", "conversation/bees")
    assert [turn["metadata"]["question"] for turn in turns] == ["What spoils?", "And why?"]
    assert turns[0]["id"] in {own["id"] for own in second["sources"]}
    code, out, _ = run(capsys, "ask", store, "And why?", *command)
    assert code == 0 and "after: What spoils?" in out
    assert "cannot read an earlier version" in bad(capsys, "ask", store, "Why?", "--at", 2, *command)
    other = ["--namespace", "conversation/wasps"]
    assert "another conversation" in bad(capsys, "ask", store, "Why?", *command, *other)


# Keeping


def test_verify(capsys, store, monkeypatch):
    without_models(monkeypatch)
    assert good(capsys, "verify", store) == [{"store": str(store), "problems": []}]
    segment = next((store / "segments").iterdir())
    damaged = bytearray(segment.read_bytes())
    damaged[-1] ^= 1
    segment.write_bytes(damaged)
    code, out, _ = run(capsys, "verify", store)
    assert code == 1 and segment.name in out
    code, out, _ = run(capsys, "verify", store, "--json")
    assert code == 1 and len(json.loads(out)["problems"]) == 1
    (store / "store.sqlite").write_bytes(b"no database")
    code, out, err = run(capsys, "verify", store, "--json")
    assert code == 1 and json.loads(out)["problems"] and not err


def test_compact_and_stats(capsys, store, monkeypatch):
    without_models(monkeypatch)
    good(capsys, "delete", store, "gold")
    before = good(capsys, "stats", store)[0]
    assert (before["documents"], before["versions"], before["keys_bits"]) == (2, 3, 4)
    [done] = good(capsys, "compact", store)
    assert done["bytes"] < done["bytes_before"]
    assert done["bytes"] == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    good(capsys, "undo", store)
    good(capsys, "delete", store, "gold")
    good(capsys, "compact", store, "--drop-history")
    after = good(capsys, "stats", store)[0]
    assert after["versions"] == 2 and after["vector_bytes"] < before["vector_bytes"]
    assert "cannot be undone" in bad(capsys, "undo", store)
    code, out, _ = run(capsys, "stats", store)
    assert code == 0 and "default: 1, people: 1" in out


def test_export_and_import(capsys, tmp_path, store, model_folder, monkeypatch):
    export = tmp_path / "export"
    assert good(capsys, "export", store, export)[0]["documents"] == 3
    with monkeypatch.context() as context:
        without_models(context)
        assert good(capsys, "import", tmp_path / "copy", export)[0]["documents"] == 3
        assert contents(tmp_path / "copy") == contents(store)
        good(capsys, "import", tmp_path / "copy", export)
        good(capsys, "import", tmp_path / "copy", export, "--namespace", "second")
    assert good(capsys, "stats", tmp_path / "copy")[0]["namespaces"] == {
        "default": 2,
        "people": 1,
        "second": 3,
    }
    bits = ["--model", model_folder, "--key-bits", "dense"]
    good(capsys, "import", tmp_path / "dense", export, *bits, "--namespace", "all")
    found = good(capsys, "stats", tmp_path / "dense")[0]
    assert found["keys_bits"] is None and found["namespaces"] == {"all": 3}
    # Into a store with other bits the texts are encoded, by the model that the store remembers.
    assert good(capsys, "import", tmp_path / "dense", export)[0]["documents"] == 3
    assert "for a new store" in bad(capsys, "import", tmp_path / "dense", export, *bits)
    assert "name the model" in bad(capsys, "import", tmp_path / "new", export, "--namespace", "x")
    assert good(capsys, "export", store, export, "--at", 2)[0]["documents"] == 2
    assert good(capsys, "export", store, export, "--namespace", "people")[0]["documents"] == 1
    assert "is no export" in bad(capsys, "export", store, tmp_path)


def test_reencode(capsys, tmp_path, store, tiny_tokenizer):
    other = tmp_path / "other"
    tiny_model(seed=5, retrieval="router", max_position_embeddings=2048).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    assert "another model" in bad(capsys, "search", store, "q", "--model", other)
    assert good(capsys, "reencode", store, other)[0] == {
        "store": str(store),
        "documents": 3,
        "model": str(other),
    }
    assert good(capsys, "search", store, "What spoils?")[0]["id"]
    assert good(capsys, "stats", store)[0]["model"] == str(other)


def test_plain_output(capsys, store):
    """Without --json every command prints something to read."""
    for command, expected in (
        (["list", store], "honey  (default, 19 tokens)  Honey never spoils."),
        (["search", store, "spoils", "--mode", "lexical"], "1  honey  (default, score"),
        (["history", store], "create"),
        (["history", store, "honey"], "added    Honey never spoils."),
        (["delete", store, "gold"], "version 4"),
        (["undo", store], "version 5: 1 documents came, 0 went"),
        (["verify", store], "as it was written"),
    ):
        code, out, _ = run(capsys, *command)
        assert code == 0 and expected in out
