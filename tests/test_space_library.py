"""The app without a browser: libraries, limits, uploads, sessions and what is shown."""

import threading
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from space_cases import (
    HANG,
    MARKUP,
    NILE,
    SEINE,
    Clock,
    pdf,
    space_model,
    zipped,
    zipped_encrypted,
    zipped_link,
)

from msa_hf import MemoryStore
from msa_hf.asking import ask as ask_plainly
from msa_hf.documents import Document
from msa_hf.serving import generation
from msa_hf.space_app import engine, library, rendering
from msa_hf.space_app.adding import add_files, add_text, update_text
from msa_hf.space_app.archives import unpack
from msa_hf.space_app.history import Passage, Turn
from msa_hf.space_app.library import Row
from msa_hf.space_app.limits import Limits
from msa_hf.space_app.meter import cache_bytes
from msa_hf.space_app.questions import any_shared, ask
from msa_hf.space_app.refusals import Refused
from msa_hf.space_app.space import Space
from msa_hf.space_app.turns import Turns

LIMITS = Limits(
    file_bytes=20_000,
    upload_bytes=30_000,
    upload_files=3,
    archive_files=5,
    archive_bytes=50_000,
    documents=4,
    tokens=3_000,
    piece_tokens=64,
    question_characters=200,
    answer_tokens=4,
    questions_per_minute=5,
    uploads_per_minute=100,
    idle_seconds=100,
    keep_seconds=1000,
)


@pytest.fixture(scope="module")
def model():
    return space_model()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def space(tmp_path, model, tiny_tokenizer, clock):
    space = Space(model, tiny_tokenizer, "tiny", tmp_path / "state", LIMITS, portion_tokens=64, clock=clock)
    yield space
    space.close()


@pytest.fixture
def session(space):
    return space.sessions.new()


def document(name, text):
    return Document(name, "", text, name, {"kind": "text"})


def add(session, *documents):
    *_, last = session.library.add([document(name, text) for name, text in documents])
    return last


def names(session):
    return [row.name for row in session.library.rows()]


def everything(session):
    """All that a library holds, as texts by id."""
    with MemoryStore.open(session.library.store, read_only=True) as store:
        return {own.id: own.text for own in store.list()}


def send(space, session, tmp_path, **files):
    """Uploads files; underscores in names stand for dots."""
    paths = []
    for name, data in files.items():
        paths.append(tmp_path / name.replace("_", "."))
        paths[-1].write_bytes(data)
    return list(add_files(space, session, paths))


# Adding, and its limits


def test_a_document_is_added_in_portions_that_are_there_when_they_are_reported(session):
    text = " ".join(f"Sentence number {n} tells of a river." for n in range(30))
    seen = []
    for progress in session.library.add([document("rivers", text)]):
        with MemoryStore.open(session.library.store, read_only=True) as store:
            stored = sum(own.tokens for own in store.list())
        assert stored == progress.tokens
        seen.append(progress)
    assert len(seen) > 5 and seen[-1].ended and not seen[-1].cancelled
    assert seen[-1].tokens == seen[-1].all_tokens and seen[-1].documents == 1
    assert " ".join(session.library.text("rivers").split()) == text


def test_cutting_is_shown_before_anything_is_read(session, monkeypatch):
    monkeypatch.setattr(library, "SHOWN_EVERY", -1)
    states = list(session.library.add([document("nile", NILE), document("seine", SEINE)]))
    assert [(own.cut, own.all_tokens) for own in states[:2]] == [(1, 0), (2, 0)]
    assert "1 of 2 documents" in rendering.progress_panel(states[0])
    assert states[2].all_tokens > 0 == states[2].tokens and states[-1].ended


def test_cancel_keeps_what_is_done_and_undo_takes_it_back(session):
    add(session, ("first", NILE))
    before = everything(session)
    portions = session.library.add([document("many", "A river flows into the sea. " * 40)])
    done = [next(portions) for _ in range(3)]
    session.library.cancel()
    *_, last = portions
    assert last.ended and last.cancelled and last.tokens == done[-1].tokens < last.all_tokens
    kept = {id: text for id, text in everything(session).items() if id not in before}
    assert 1 <= len(kept) < 20 and names(session) == ["first", "many"]
    session.library.undo()
    assert everything(session) == before
    session.library.redo()
    assert everything(session) == before | kept


def test_cancel_does_not_leave_a_document_half_replaced(session):
    add(session, ("book", "An old line of the book. " * 20))
    portions = session.library.add(
        [document("book", "A new line of the book. " * 40), document("next", NILE)]
    )
    next(portions)
    next(portions)
    session.library.cancel()
    *_, last = portions
    assert last.cancelled and names(session) == ["book"]
    assert "old" not in " ".join(everything(session).values())


def test_a_file_of_the_same_name_replaces_and_undo_is_one_step(session):
    add(session, ("book", "An old line of the book. " * 40))
    before = everything(session)
    add(session, ("book", "One new line."))
    assert everything(session) == {"book": "One new line."}
    session.library.undo()
    assert everything(session) == before
    session.library.undo()
    assert everything(session) == {}
    with pytest.raises(Refused, match="nothing to undo"):
        session.library.undo()


def test_names_that_a_store_would_not_take_or_mix_up(session):
    add(session, ("a#1", NILE), ("a\n#1", SEINE), ("", "Third."))
    assert len(set(names(session))) == 3 and not any("#" in name for name in names(session))


def test_an_update_of_a_document(space, session):
    list(add_text(space, session, NILE, "River"))
    list(update_text(space, session, "River", SEINE))
    assert everything(session) == {"River": f"River\n{SEINE}"} and session.library.text("River") == SEINE
    with pytest.raises(Refused, match="no document"):
        list(update_text(space, session, "Rhine", SEINE))


def test_delete_forget_and_search(space, session):
    add(session, ("nile.txt", NILE), ("seine.txt", SEINE), ("x.txt", "Secret of the sphinx."))
    assert [row.name for row in session.library.rows("SEINE txt")] == ["seine.txt"]
    with pytest.raises(Refused, match="no document 'rhine'"):
        session.library.delete(["nile.txt", "rhine"])
    session.library.delete(["nile.txt"])
    assert names(session) == ["seine.txt", "x.txt"]
    session.library.undo()
    session.library.forget(["x.txt"])
    assert names(session) == ["nile.txt", "seine.txt"] and session.library.undoable == 0
    held = b"".join(path.read_bytes() for path in session.folder.rglob("*") if path.is_file())
    assert b"sphinx" not in held and b"Cairo" in held
    with pytest.raises(Refused, match="nothing to undo"):
        session.library.undo()


def test_other_changes_wait_while_documents_are_added(session):
    add(session, ("first", NILE))
    portions = session.library.add([document("more", SEINE * 10)])
    next(portions)
    for change in (
        lambda: session.library.delete(["first"]),
        session.library.undo,
        lambda: add(session, ("x", "x")),
    ):
        with pytest.raises(Refused, match="being added"):
            change()
    assert names(session) == ["first"]  # reading goes on
    portions.close()
    session.library.delete(["first"])


def test_too_many_documents_or_tokens_are_refused_before_the_first(session):
    add(session, ("one", NILE))
    before = everything(session)
    with pytest.raises(Refused, match=r"5 documents; it may have 4"):
        add(session, *((f"d{n}", NILE) for n in range(4)))
    with pytest.raises(Refused, match=r"tokens; it may have 3,000"):
        add(session, ("big", "word " * 900))
    assert everything(session) == before and session.library.undoable == 1


# Uploads

SMALL_PDF = pdf("Nile")
REFUSED = {
    "kind": ({"a_exe": b"MZ"}, r"a\.exe: this kind of file is not taken"),
    "size": ({"a_txt": b"x" * 20_001}, r"a\.txt has"),
    "sum": ({"a_txt": b"x" * 16_000, "b_txt": b"x" * 16_000}, "together"),
    "count": ({f"a{n}_txt": b"x" for n in range(4)}, "too many for one upload"),
    "empty": ({"a_txt": b""}, "is empty"),
    "blank": ({"a_txt": b" \n "}, "has no text"),
    "binary": ({"a_txt": b"text\0text"}, "a.txt"),
    "controls": ({"a_txt": bytes(range(1, 32)) * 20}, "not text"),
    "broken pdf": ({"a_pdf": b"%PDF-1.4 nothing"}, r"a\.pdf is damaged"),
    "cut pdf": ({"a_pdf": SMALL_PDF[: len(SMALL_PDF) // 3]}, r"a\.pdf"),
    "encrypted pdf": ({"a_pdf": pdf("Nile", "secret")}, "encrypted"),
    "pdf without text": ({"a_pdf": pdf()}, "OCR"),
    "no zip": ({"a_zip": b"PK nothing"}, "no zip file"),
    "empty zip": ({"a_zip": zipped({})}, "is empty"),
    "zip of nothing readable": ({"a_zip": zipped({"a.exe": b"x"})}, "has no text"),
    "zip of many": ({"a_zip": zipped({f"{n}.txt": b"x" for n in range(6)})}, "6 files"),
    "zip with large file": ({"a_zip": zipped({"a.txt": b"x" * 30_000})}, r"a\.txt"),
    "zip bomb": ({"a_zip": zipped({f"{n}.txt": b"x" * 15_000 for n in range(4)})}, "would unpack"),
    "nested zip": ({"a_zip": zipped({"b.zip": zipped({"a.txt": b"x"})})}, "archive in an archive"),
    "zip with parent path": ({"a_zip": zipped({"../a.txt": b"x"})}, "leads out"),
    "zip with absolute path": ({"a_zip": zipped({"/a.txt": b"x"})}, "leads out"),
    "zip with backslashes": ({"a_zip": zipped({"..\\a.txt": b"x"})}, "leads out"),
    "zip with drive": ({"a_zip": zipped({"C:a.txt": b"x"})}, "leads out"),
    "zip with link": ({"a_zip": zipped_link("a.txt", "/etc/passwd")}, "link"),
    "zip with password": ({"a_zip": zipped_encrypted()}, "encrypted"),
    "zip with broken pdf": ({"a_zip": zipped({"a.txt": b"fine", "b.pdf": b"%PDF no"})}, r"b\.pdf is damaged"),
    "one of two": ({"a_txt": NILE.encode(), "b_pdf": b"%PDF no"}, r"b\.pdf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_upload_changes_nothing(case, space, session, tmp_path):
    add(session, ("one", NILE))
    before = everything(session)
    files, message = REFUSED[case]
    with pytest.raises(Refused, match=message) as error:
        send(space, session, tmp_path, **files)
    assert str(tmp_path) not in str(error.value)
    assert everything(session) == before and session.library.undoable == 1
    assert not list(session.folder.glob("incoming/*"))
    assert {path.name for path in tmp_path.iterdir()} <= {
        "state",
        *(name.replace("_", ".") for name in files),
    }


def test_a_high_ratio_is_refused_even_where_the_size_is_not(tmp_path, session, space):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"a.txt": b"a" * 5_000_000}))
    wide = replace(LIMITS, file_bytes=10_000_000, archive_bytes=10_000_000)
    with pytest.raises(Refused, match="more than 100 times"):
        unpack(path, "a.zip", tmp_path / "out", wide)
    path.write_bytes(zipped({"a.txt": b"a" * 5_000_000}, zipfile.ZIP_STORED))
    unpack(path, "a.zip", tmp_path / "out", wide)
    assert (tmp_path / "out" / "a.txt").stat().st_size == 5_000_000


def test_an_upload_of_all_kinds(space, session, tmp_path):
    archive = zipped({"docs/a.md": b"# Alpha\nFirst.", "b.py": b"x = 1\n", "c.png": b"\x89PNG"})
    send(
        space, session, tmp_path, page_html=f"<p>{SEINE}</p>".encode(), n_pdf=pdf("Nile flows"), z_zip=archive
    )
    assert names(session) == ["page.html", "n.pdf", "z/b.py", "z/docs/a.md"]
    assert "Nile flows" in session.library.text("n.pdf") and session.library.text("page.html") == SEINE


def test_a_folder_brings_what_can_be_read(space, session, tmp_path):
    files = {"nile.txt": NILE, ".hidden.txt": NILE, "photo.png": "x", "empty.txt": "", "code.py": "x = 1\n"}
    paths = [tmp_path / name for name in files]
    for path, text in zip(paths, files.values()):
        path.write_text(text)
    list(add_files(space, session, paths, folder=True))
    assert names(session) == ["nile.txt", "code.py"]
    with pytest.raises(Refused, match="no file that is taken"):
        list(add_files(space, session, paths[1:4], folder=True))
    with pytest.raises(Refused, match=r"photo\.png"):
        list(add_files(space, session, paths[2:3]))
    many = [paths[0]] * (LIMITS.archive_files + 1)
    with pytest.raises(Refused, match="too many for one upload"):
        list(add_files(space, session, many, folder=True))
    assert names(session) == ["nile.txt", "code.py"]


def test_uploads_a_minute(space, session, clock):
    for _ in range(LIMITS.uploads_per_minute):
        with pytest.raises(Refused, match="no text"):
            list(add_text(space, session, " "))
    with pytest.raises(Refused, match="At most 100 uploads a minute: try again in 60 seconds"):
        list(add_text(space, session, NILE))
    clock.now += 60
    list(add_text(space, session, NILE))
    assert names(session) == ["Note"]


# Asking


def test_an_answer_is_that_of_the_model_and_is_remembered(space, session, model, tiny_tokenizer):
    add(session, ("nile.txt", NILE), ("seine.txt", SEINE))
    question = "Which river flows through Cairo?"
    turns = list(ask(space.engine, LIMITS, session, question))
    with MemoryStore.open(session.library.store, model, tiny_tokenizer, read_only=True) as store:
        plain = ask_plainly(model, tiny_tokenizer, store.bank(), question, mode="fused", max_new_tokens=4)
    last = turns[-1]
    assert last.answer == plain.answer and last.state == "done" and turns[0].state == "waiting"
    assert [(own.document, own.router_rank, own.per_layer) for own in last.passages] == [
        (own.id, own.router_rank, {str(layer): score for layer, score in own.per_layer.items()})
        for own in plain.sources
    ]
    again = space.sessions.get(session.key)
    assert again.history.turns[-1].to_dict() == last.to_dict()


def test_what_cannot_be_asked(space, session):
    for question, message in (("  ", "Type a question"), ("x" * 201, "201 characters")):
        with pytest.raises(Refused, match=message):
            list(ask(space.engine, LIMITS, session, question))
    with pytest.raises(Refused, match="library is empty"):
        list(ask(space.engine, LIMITS, session, "Who?"))
    add(session, ("nile", NILE))
    with pytest.raises(Refused, match="can be asked by"):
        list(ask(space.engine, LIMITS, session, "Who?", "Attention to the memory"))
    for options in ({"k": 9}, {"k": -1}, {"rounds": 5}, {"k": 1.5}, {"rounds": True}):
        with pytest.raises(Refused, match="must be from 0"):
            list(ask(space.engine, LIMITS, session, "Who?", **options))
    assert session.history.turns == []


def test_questions_a_minute(space, session, clock):
    add(session, ("nile", NILE))
    for _ in range(LIMITS.questions_per_minute):
        list(ask(space.engine, LIMITS, session, "Who?"))
    with pytest.raises(Refused, match="At most 5 questions a minute"):
        list(ask(space.engine, LIMITS, session, "Who?"))
    clock.now += 60
    assert list(ask(space.engine, LIMITS, session, "Who?"))[-1].state == "done"


def test_stop_ends_the_generation(space, session, monkeypatch):
    add(session, ("nile", NILE))
    calls = []

    class Watch(generation._Watch):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append(len(calls))
            if len(calls) == 2:
                session.stop.touch()
                assert wait_for(lambda: self._generation.over)
            return super().__call__(input_ids, scores, **kwargs)

    monkeypatch.setattr(generation, "_Watch", Watch)
    last = list(ask(space.engine, LIMITS, session, "Which river?"))[-1]
    assert last.state == "stopped" and len(calls) == 2  # of four
    assert session.history.turns[-1].state == "stopped" and not session.stop.exists()
    monkeypatch.undo()
    assert list(ask(space.engine, LIMITS, session, "Which river?"))[-1].state == "done"


def wait_for(condition):
    over = threading.Event()
    return any(condition() or over.wait(0.01) for _ in range(HANG * 100))


def test_a_follow_up_is_asked_with_what_it_refers_to(space, session, monkeypatch):
    add(session, ("nile", NILE))
    asked = []
    answer = space.engine.answer
    monkeypatch.setattr(space.engine, "answer", lambda *a: asked.append(a[1]) or answer(*a))
    first = list(ask(space.engine, LIMITS, session, "Which river flows through Cairo?"))[-1]
    list(ask(space.engine, LIMITS, session, "And where does it end?"))
    list(ask(space.engine, LIMITS, session, "Which river flows through Paris?"))
    line = first.answer.partition("\n")[0]
    assert [own.earlier for own in asked] == [(), (("Which river flows through Cairo?", line),), ()]


def test_nothing_relevant_is_said(space, session):
    add(session, ("nile", NILE))
    assert not list(ask(space.engine, LIMITS, session, "Who painted Guernica?"))[-1].found
    assert list(ask(space.engine, LIMITS, session, "What is Cairo?"))[-1].found
    assert any_shared("Was ist SEINE?", ["La seine."]) and not any_shared("What is the?", ["the is what"])
    assert "Nothing relevant was found" in rendering.turn_block(Turn("q", "a", "done", found=False))


def test_ways_are_those_of_the_checkpoint(space, model, monkeypatch):
    def ways(**fields):
        for name, value in fields.items():
            monkeypatch.setattr(model.config, name, value)
        return space.engine.ways

    assert ways() == [engine.BOTH, engine.WORDS, engine.ROUTERS]
    assert ways(routers_trained=False) == [engine.WORDS]
    assert ways(retrieval="attention") == [engine.ATTENTION]
    assert ways(retrieval="generative", prompt_format="msa") == [engine.GENERATIVE, engine.ATTENTION]


def test_turns_rotate_between_visitors():
    turns, order, threads = Turns(waiting=10), [], []

    def work(visitor):
        with turns.of(visitor):
            order.append(visitor)

    with turns.of("holder"):
        for number, visitor in enumerate(["greedy", "greedy", "greedy", "modest"], 1):
            threads.append(threading.Thread(target=work, args=(visitor,)))
            threads[-1].start()
            assert wait_for(lambda number=number: turns.waiting == number)
    for thread in threads:
        thread.join(HANG)
    assert order == ["greedy", "modest", "greedy", "greedy"]


def test_too_many_who_wait_are_sent_away():
    turns = Turns(waiting=1)
    with turns.of("a"):
        waiter = threading.Thread(target=lambda: turns.of("b").__enter__())
        waiter.start()
        assert wait_for(lambda: turns.waiting == 1)
        with pytest.raises(Refused, match="Too many"), turns.of("c"):
            pass
    waiter.join(HANG)


# Sessions


def test_a_key_opens_its_own_session_alone(space):
    one, two = space.sessions.new(), space.sessions.new()
    add(one, ("nile", NILE))
    assert names(space.sessions.get(one.key)) == ["nile"] and names(space.sessions.get(two.key)) == []
    assert len(one.key) == 32 and one.key not in str(one.folder)
    bad = [
        "",
        "../" + one.name,
        one.name,
        one.key.upper(),
        one.key[:-1],
        one.key + "\n",
        None,
        5,
        "0" * 32,
        ".",
        "\ud800" * 32,
    ]
    for key in bad:
        with pytest.raises(Refused, match="session"):
            space.sessions.get(key)
    assert {path.name for path in space.sessions.folder.iterdir()} == {one.name, two.name}


def test_a_restart_finds_the_library(tmp_path, model, tiny_tokenizer, clock):
    def opened():
        return Space(model, tiny_tokenizer, "tiny", tmp_path / "state", LIMITS, clock=clock)

    first = opened()
    session = first.sessions.new()
    add(session, ("nile", NILE))
    list(ask(first.engine, LIMITS, session, "Which river?"))
    secret = first.secret
    first.close()
    second = opened()
    again = second.sessions.get(session.key)
    assert names(again) == ["nile"] and len(again.history.turns) == 1 and second.secret == secret
    again.library.undo()
    assert names(again) == []


def test_idle_sessions_are_closed_and_later_removed(space, clock):
    one, two = space.sessions.new(), space.sessions.new()
    add(one, ("nile", NILE))
    clock.now += 101
    space.sessions.get(two.key)
    space.sessions.sweep()
    assert space.sessions.open == 1 and names(space.sessions.get(one.key)) == ["nile"]
    clock.now += 1001
    space.sessions.get(two.key)
    space.sessions.sweep()
    with pytest.raises(Refused, match="its library is gone"):
        space.sessions.get(one.key)
    assert not one.folder.exists() and two.folder.exists()
    assert space.sessions.ensure(one.key).key != one.key and space.sessions.ensure(two.key).key == two.key


def test_a_busy_session_is_not_removed(space, session, clock):
    portions = session.library.add([document("nile", NILE * 5)])
    next(portions)
    clock.now += 5000
    space.sessions.sweep()
    list(portions)
    assert names(space.sessions.get(session.key)) == ["nile"]


def test_disk_and_number_of_sessions_are_limited(tmp_path, model, tiny_tokenizer):
    limits = replace(LIMITS, sessions=2)
    space = Space(model, tiny_tokenizer, "tiny", tmp_path / "a", limits)
    one = space.sessions.new()
    space.sessions.new()
    with pytest.raises(Refused, match="Too many libraries"):
        space.sessions.new()
    assert space.sessions.bytes() == sum(
        p.lstat().st_size for p in space.sessions.folder.rglob("*") if p.is_file()
    )
    full = Space(model, tiny_tokenizer, "tiny", tmp_path / "a", replace(LIMITS, disk_bytes=1))
    with pytest.raises(Refused, match="disk"):
        list(add_text(full, full.sessions.get(one.key), NILE))
    with pytest.raises(Refused, match="disk"):
        full.sessions.new()


def test_a_temporary_state_ends_with_the_space(model, tiny_tokenizer):
    space = Space(model, tiny_tokenizer, "tiny")
    add(space.sessions.new(), ("nile", NILE))
    assert space.state.is_dir() and space.state.stat().st_mode & 0o077 == 0
    space.close()
    assert not space.state.exists()


# What is shown


class Tags(HTMLParser):
    """Tags, attributes and the text of what was rendered."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), {}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= dict(attributes)

    def handle_data(self, data):
        self.text += data


OURS = set(
    "article div details summary h4 b small p span i mark table caption thead tbody tr th td section".split()
)


def test_untrusted_text_stays_text():
    passage = Passage(MARKUP, 1, MARKUP, 1, 1, 1.0, 1, 1.0, None, {MARKUP: 1.0}, f"{MARKUP}\n{MARKUP}")
    turn = Turn(MARKUP, MARKUP, "done", [passage], False)
    shown = [
        rendering.turn_block(turn),
        rendering.conversation([turn, turn]),
        rendering.document_table([Row(MARKUP, MARKUP + ".", "text", 1, 1)], False),
        rendering.note(MARKUP, "bad"),
    ]
    for html in shown:
        parsed = Tags(html)
        assert parsed.tags <= OURS and not {name for name in parsed.attributes if name.startswith("on")}
        assert MARKUP in parsed.text
        assert not any(c in html for c in "${}`")


def test_marks_are_the_words_of_the_question():
    html = rendering.highlighted("Nile & nile's <b>", {"nile", "b"})
    assert html == "<mark>Nile</mark> &amp; <mark>nile</mark>&#x27;s &lt;<mark>b</mark>&gt;"


def test_the_meter_counts_what_is_there(space, session, model, tiny_tokenizer):
    assert session.library.meter().to_dict()["tokens"] == 0
    add(session, ("nile", NILE), ("seine", SEINE * 5))
    meter = session.library.meter()
    texts = list(everything(session).values())
    tokens = sum(len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    config = model.config
    # A key and a value of head_dim numbers, two bytes each, per key/value head, layer and token.
    per_token = 2 * 2 * config.head_dim * config.num_key_value_heads * config.num_hidden_layers
    assert (meter.documents, meter.passages, meter.tokens) == (2, len(texts), tokens)
    assert meter.cache_bytes == per_token * tokens == cache_bytes(config, tokens)
    files = sum(path.stat().st_size for path in session.library.store.glob("segments/*.safetensors"))
    assert meter.vector_bytes == files and meter.bytes_per_token == files / tokens
    html = rendering.meter_panel(meter)
    assert f"{tokens:,}" in html and "Plain KV cache" in html


def test_a_plain_cache_really_takes_these_bytes(model):
    ids = torch.ones(1, 17, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(model.config, 17) == 2 * numbers


def test_heat_map_has_a_row_per_layer_and_a_column_per_passage():
    passages = [
        Passage(str(n), 0, str(n), 1, n, 1.0, n, 1.0, None, {"4": n / 2, "8": -n}, "t") for n in (1, 2, 3)
    ]
    html = rendering.heat_map(passages)
    assert html.count("<td style") == 6 and html.count('scope="row"') == 2
    assert '--heat:1.000">1.500' in html and '--heat:0.000">-3.000' in html
