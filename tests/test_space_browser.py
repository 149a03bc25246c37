"""The app's page in a real Chromium: a visit with a book, two visitors at once,
refused uploads, and use by keyboard.

Skipped where playwright or a Chromium is missing.
"""

import re

import pytest

pytest.importorskip("gradio")

from space_browser import of_scripts, visitors  # noqa: E402
from space_cases import MARKUP, NILE, SEINE, pdf, space_model, zipped  # noqa: E402

from msa_hf.model_loading import load_model  # noqa: E402
from msa_hf.space_app.adding import add_text  # noqa: E402
from msa_hf.space_app.limits import Limits  # noqa: E402
from msa_hf.space_app.server import served  # noqa: E402
from msa_hf.space_app.space import Space  # noqa: E402

BOOK = "Oxygen"
KNOWN = ("When did Carl Wilhelm Scheele", "What early Greek wrote", "What spacecraft contained data")
MANY = {"uploads_per_minute": 1000, "questions_per_minute": 1000}


@pytest.fixture(scope="module")
def browser():
    with visitors().browsing() as own:
        yield own


@pytest.fixture(scope="module")
def visit(browser):
    """Opens the page as somebody new; whatever a page complained of fails the module's end."""
    opened = []

    def visit(url, **options):
        opened.append(visitors().Visitor(browser, url, **options))
        return opened[-1]

    yield visit
    assert [own.problems for own in opened] == [[]] * len(opened)


@pytest.fixture(scope="module")
def real(tmp_path_factory, smollm2):
    model, tokenizer = load_model(str(smollm2), "cpu", "float32")
    limits = Limits(answer_tokens=16, comparison_tokens=320, **MANY)
    with served(
        Space(model, tokenizer, "real", tmp_path_factory.mktemp("real"), limits, portion_tokens=1024)
    ) as url:
        yield url


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_tokenizer):
    limits = Limits(file_bytes=2 << 20, piece_tokens=256, answer_tokens=4, **MANY)
    state = tmp_path_factory.mktemp("tiny")
    space = Space(space_model(), tiny_tokenizer, "tiny", state, limits, portion_tokens=64)
    with served(space) as space.url:
        yield space


def figures(shown):
    """Tokens that each of the progress panel's texts tells."""
    return [
        int(found[1].replace(",", ""))
        for text in shown
        if (found := re.search(r"([\d,]+) of [\d,]+ tok", text))
    ]


def told(reply, question):
    """Whether a reply has the answer, and a passage of the right document that has it, too."""
    found = [own for own in reply.sources if question.answered_by(own.text)]
    return question.answered_by(reply.answer) and bool(found)


def question(title, start):
    [own] = [own for own in of_scripts("space_texts").questions(title) if own.text.startswith(start)]
    return own


def test_a_visit_from_the_first_book_to_its_return(visit, real, tmp_path):
    texts = of_scripts("space_texts")
    [(_, rhine)] = texts.articles(28, 1).items()
    [(_, oxygen)] = texts.articles(7, 1).items()
    (tmp_path / "book.pdf").write_bytes(texts.book({BOOK: oxygen}))
    halves = {"rhine/upper.txt": rhine[: len(rhine) // 2], "rhine/lower.txt": rhine[len(rhine) // 2 :]}
    for name, text in halves.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "rhine" / "map.png").write_bytes(b"\x89PNG")
    for name, text in (("nile.txt", NILE), ("seine.txt", SEINE)):
        (tmp_path / name).write_text(text)
    visitor = visit(real)

    visitor.upload(tmp_path / "book.pdf")
    visitor.added()
    moved = sorted(set(figures(visitor.watched())))
    assert len(moved) > 2 and moved[0] == 0
    visitor.upload_folder(tmp_path / "rhine")
    visitor.listed("lower.txt")
    visitor.upload(tmp_path / "nile.txt", tmp_path / "seine.txt")
    visitor.listed("seine.txt")
    names = visitor.documents()
    assert len(names) == 5 and {"book.pdf", "nile.txt", "seine.txt"} <= set(names)

    asked = [question(BOOK, start) for start in KNOWN]
    for own in asked:
        reply = visitor.ask(own.text)
        assert told(reply, own), reply
        assert "book.pdf" in {source.document for source in reply.sources}
    assert visitor.page.locator(".msa-turn").last.locator("mark").count()

    visitor.choose("book.pdf")
    visitor.press("Delete")
    visitor.listed("book.pdf", there=False)
    gone = visitor.ask(asked[0].text)
    assert "book.pdf" not in {source.document for source in gone.sources} and not told(gone, asked[0])
    visitor.tab("Library")
    visitor.press("Undo")
    visitor.listed("book.pdf")
    assert told(visitor.ask(asked[0].text), asked[0])

    dense, four, *others = visitor.compare(asked[0].text, 320)
    assert dense.startswith("Dense") and "200 % of bfloat16" in dense  # float32
    assert four.startswith("4 bits") and re.search(r"Bits\s4\.[12]\d", four) and len(others) == 4
    assert all(("same answer" in row) != ("differs" in row) for row in (four, *others))
    facts = visitor.needles([1000], 2)
    assert len(facts) == 2 and all("1,0" in fact and "router rank 1 of" in fact for fact in facts)
    cells = visitor.page.locator(".msa-map button.msa-needle")
    assert cells.count() == 2 and visitor.page.get_by_text(re.compile(r"of 2 facts found")).is_visible()
    cells.last.click()
    assert visitor.page.locator(".msa-facts .msa-chosen").count() == 1


def test_two_visitors_see_nothing_of_each_other(visit, tiny, tmp_path):
    one, two = visit(tiny.url), visit(tiny.url)
    for visitor, name, text in ((one, "nile.txt", NILE), (two, "seine.txt", SEINE)):
        (tmp_path / name).write_text(text)
        visitor.upload(tmp_path / name)
    for _ in range(2):
        for visitor, name in ((one, "nile.txt"), (two, "seine.txt")):
            visitor.listed(name)
            assert visitor.documents() == [name]
            reply = visitor.ask("Which river is in Africa, and which in France?")
            assert {source.document for source in reply.sources} == {name}
            visitor.reload()
    for visitor, other in ((one, "Seine"), (two, "Nile")):
        for name in visitors().TABS:
            visitor.tab(name)
            assert other not in visitor.page.locator("body").inner_text().replace("Which river", "")


REFUSED = {
    "program.exe": (b"MZ", "this kind of file is not taken"),
    "large.txt": (b"a line of text\n" * 150_000, "maximum|file may have"),
    "broken.pdf": (b"%PDF-1.4 and nothing more", "damaged or no PDF"),
    "scanned.pdf": (pdf(), "has no text"),
    "locked.pdf": (pdf("text", "secret"), "encrypted"),
    "bomb.zip": (zipped({"bomb.txt": b"0" * (1500 << 10)}), "100 times its size"),
    "damaged.zip": (b"PK\3\4 and nothing more", "damaged or no zip"),
    "outside.zip": (zipped({"../outside.txt": b"text"}), "leads out of the archive"),
    "binary.txt": (bytes(range(32)) * 9, "holds binary data, not text"),
}


@pytest.fixture(scope="module")
def reader(visit, tiny, tmp_path_factory):
    """A visitor who has one document."""
    visitor = visit(tiny.url)
    path = tmp_path_factory.mktemp("reader") / "nile.txt"
    path.write_text(NILE)
    visitor.upload(path)
    visitor.listed("nile.txt")
    return visitor


def test_what_was_searched_and_chosen_stays_when_the_tab_is_filled_again(visit, tiny):
    visitor = visit(tiny.url)
    session = max(tiny.sessions._open.values(), key=lambda own: own.used)
    list(add_text(tiny, session, NILE, "Nile"))
    visitor.reload()
    visitor.listed("Nile")
    visitor.choose("Nile")
    visitor.search("no such words")
    empty = visitor.page.get_by_text("No document matches these words.")
    empty.wait_for()
    list(add_text(tiny, session, SEINE, "Seine"))
    visitor.tab("Ask")
    visitor.tab("Library")
    visitor.page.locator(".msa-meter", has_text="2 passages").wait_for()
    assert empty.is_visible() and visitor.page.get_by_title("Clear", exact=True).is_visible()


def test_what_is_searched_while_documents_are_added_stays(visit, tiny, tmp_path):
    visitor = visit(tiny.url)
    for name, text in (("nile.txt", NILE), ("seine.txt", SEINE)):
        (tmp_path / name).write_text(text)
    visitor.upload(tmp_path / "nile.txt")
    visitor.listed("nile.txt")
    visitor.search("seine")
    visitor.page.get_by_text("No document matches these words.").wait_for()
    visitor.upload(tmp_path / "seine.txt")
    visitor.listed("seine.txt")
    assert visitor.documents() == ["seine.txt"]
    visitor.search("")
    visitor.listed("nile.txt")


def test_a_refused_text_can_be_mended(visit, tiny):
    visitor = visit(tiny.url)
    visitor.page.get_by_role("button", name="Paste a text").click()
    field = visitor.page.get_by_label("Text", exact=True)
    field.fill(f"{NILE}\0")
    visitor.press("Add this text")
    visitor.note().get_by_text("is not text").wait_for()
    assert field.input_value().startswith(NILE)
    field.fill(NILE)
    visitor.press("Add this text")
    visitor.listed("Note")
    visitor.page.wait_for_function("!document.querySelector('#msa-text textarea').value")
    visitor.choose("Note")
    visitor.press("Edit")
    edited = visitor.page.get_by_label("Text of the document")
    edited.fill(SEINE)
    visitor.press("Save")
    edited.wait_for(state="hidden")
    assert "Seine" in visitor.ask("Which river?").sources[0].text


def test_nothing_jumps(visit, tiny, tmp_path):
    visitor = visit(tiny.url)

    def top(locator):
        return locator.bounding_box()["y"]

    search = visitor.page.get_by_label("Search the documents")
    before = top(search)
    (tmp_path / "nile.txt").write_text("\n\n".join([NILE * 8] * 30))
    visitor.upload(tmp_path / "nile.txt")
    seen = set()
    while not visitor.progress().startswith("Added"):
        seen.add(top(search))
    assert seen | {top(search)} == {before}
    visitor.listed("nile.txt")

    left = {visitor.page.locator(".msa-hero").bounding_box()["x"]}
    for name in visitors().TABS:
        visitor.tab(name)
        left.add(visitor.page.locator(".msa-hero").bounding_box()["x"])
    assert len(left) == 1
    for number in range(3):  # each question comes to the top of the window, and the field stays in it
        visitor.ask(f"Which river flows through Cairo, and what is {number}?")
        turn = visitor.page.locator(".msa-log .msa-turn").nth(number)
        assert -1 <= top(turn) < 300 and top(turn) < top(visitor.page.locator("#msa-question"))
        field = visitor.page.locator("#msa-question").bounding_box()
        assert field["y"] + field["height"] <= 900


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_upload_says_why_and_changes_nothing(reader, tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    reader.reload()
    before = reader.page.locator(".msa-meter").inner_text()
    reader.upload(tmp_path / name)
    reader.page.get_by_text(re.compile(reason)).filter(visible=True).first.wait_for()
    assert reader.documents() == ["nile.txt"]
    reader.reload()
    assert reader.documents() == ["nile.txt"] and reader.page.locator(".msa-meter").inner_text() == before


def test_markup_of_strangers_is_text(visit, tiny, tmp_path):
    visitor = visit(tiny.url)
    (tmp_path / "page.html").write_text(
        "<p>The Nile.</p><script>alert(7)</script><img src=x onerror=alert(8)>"
    )
    (tmp_path / "markup.txt").write_text(f"{NILE} {MARKUP}")
    visitor.upload(tmp_path / "page.html", tmp_path / "markup.txt")
    visitor.listed("markup.txt")
    reply = visitor.ask(f"What of the Nile? {MARKUP}")
    assert reply.question == f"What of the Nile? {MARKUP}"
    assert MARKUP in " ".join(source.text for source in reply.sources)
    visitor.reload()
    visitor.tab("Ask")
    visitor.page.locator(".msa-passage").first.wait_for()
    made = visitor.page.locator(".msa-turn :is(script, img, svg, a)")
    assert made.count() == 0  # and `visit` fails where a dialog was opened


def test_a_question_needs_no_mouse(reader):
    """From the question's field Tab leads to its buttons, Enter sends, and the list of passages opens."""
    reader.reload()
    page = reader.page
    page.get_by_role("tab", name="Library").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    field = page.locator("#msa-question textarea, #msa-question input")
    field.wait_for()
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        if reached[-1] == "How to search":
            break
    assert reached[reached.index("question") :][:2] == ["question", "Ask"]
    assert reached[-1] == "How to search"
    field.focus()
    page.keyboard.type("Which river flows through Cairo?")
    page.keyboard.press("Enter")
    page.locator(".msa-log .msa-turn").last.wait_for()
    summary = page.locator(".msa-log summary").last
    summary.focus()
    page.keyboard.press("Enter")
    page.locator(".msa-log .msa-passage").last.wait_for(state="hidden")


# The name of what has the focus.
FOCUSED = """() => {
  const own = document.activeElement;
  return own.closest("#msa-question") ? "question" : own.innerText.split("\\n")[0].trim();
}"""
