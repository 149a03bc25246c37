"""The Needle tab without a browser: cells against the engine's, limits, turns, and what is shown."""

import re
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from space_cases import HANG, MARKUP, NILE, SEINE, Clock, space_model

from msa_hf.documents import Document
from msa_hf.evaluation.memory_needle import NeedleCell, needle_grid
from msa_hf.space_app import gpu, trials
from msa_hf.space_app.comparison import compare
from msa_hf.space_app.limits import Limits
from msa_hf.space_app.needle_view import needle_map, needle_table, progress_panel, ready_panel
from msa_hf.space_app.needles import ARTICLES, EMPTY, LIBRARY, Needles, hide, planned, reading_seconds
from msa_hf.space_app.questions import ask
from msa_hf.space_app.refusals import Refused
from msa_hf.space_app.space import Space
from msa_hf.space_app.trials import Pace

LIMITS = Limits(piece_tokens=64, answer_tokens=4, needle_cpu_tokens=2_000, needle_cells=6, trials=1)
TEXT = " ".join(f"River {n} is {n * 11} km long and flows north." for n in range(40))


@pytest.fixture(scope="module")
def model():
    return space_model()


@pytest.fixture
def space(tmp_path, model, tiny_tokenizer):
    space = Space(model, tiny_tokenizer, "tiny", tmp_path / "state", LIMITS, portion_tokens=64, clock=Clock())
    yield space
    space.close()


def filled(space, *texts):
    session = space.sessions.new()
    documents = [
        Document(f"n{i}", f"Title {i}", text, f"n{i}", {"kind": "text"}) for i, text in enumerate(texts)
    ]
    list(session.library.add(documents))
    return session


def timeless(cell):
    return {name: value for name, value in cell.to_dict().items() if "seconds" not in name}


def test_the_cells_are_those_of_the_engine_in_the_visitors_own_texts(space, model, tiny_tokenizer):
    filled(space, SEINE * 30)
    session = filled(space, TEXT, NILE)
    states = list(hide(space, session, [1000, 500], 2, 7, LIBRARY))
    texts = [Document(row.name, row.title, session.library.text(row.name)) for row in session.library.rows()]
    assert [text.title for text in texts] == ["Title 0", "Title 1"]
    plain = needle_grid(model, tiny_tokenizer, texts, [500, 1000], 2, seed=7)
    plain = [timeless(event) for event in plain if isinstance(event, NeedleCell)]
    last = states[-1]
    assert [timeless(cell) for cell in last.cells] == plain and len(plain) == 4
    assert last.state == "done" and last.tokens == last.total >= 1000 and not session.busy
    assert [len(state.cells) for state in states] == sorted(len(state.cells) for state in states)
    assert states[-2].seconds_left == 0.0 and states[-3].seconds_left > 0.0


def test_the_articles_are_the_engines(space, monkeypatch):
    given = []

    def grid(model, tokenizer, texts, *words, **options):
        given.append(texts)
        return iter(())

    monkeypatch.setattr(trials, "needle_grid", grid)
    session = space.sessions.new()
    list(hide(space, session, [500], 1))
    assert given == [None]  # what the engine itself takes by default


@pytest.mark.parametrize(
    ("lengths", "depths", "seed", "texts", "message"),
    [
        ([], 2, 0, ARTICLES, "at least one length"),
        ([2001], 2, 0, ARTICLES, "from 500 to 2,000 tokens here; got 2001"),
        ([499], 2, 0, ARTICLES, "got 499"),
        (["500"], 2, 0, ARTICLES, "got '500'"),
        (list(range(500, 509)), 1, 0, ARTICLES, "may have 8 lengths; got 9"),
        ([500], 12, 0, ARTICLES, "Depths must be a whole number from 1 to 11; got 12"),
        ([500], 2, -1, ARTICLES, "Seed must be a whole number from 0 to 1,000,000; got -1"),
        ([500, 600], 4, 0, ARTICLES, "may hide 6 facts; 2 lengths with 4 depths are 8"),
        ([500], 2, 0, "/etc/passwd", "one of: Wikipedia articles, Your library"),
    ],
)
def test_what_is_refused_names_its_limit(space, lengths, depths, seed, texts, message):
    session = space.sessions.new()
    with pytest.raises(Refused, match=re.escape(message)):
        next(hide(space, session, lengths, depths, seed, texts))
    assert not session.busy


def test_a_library_that_is_empty_or_short_is_told(space):
    with pytest.raises(Refused) as error:
        next(hide(space, space.sessions.new(), [500], 2, 0, LIBRARY))
    assert str(error.value) == EMPTY
    session = filled(space, NILE)
    with pytest.raises(Refused, match=r"^Lengths must not exceed the \d+ tokens of the texts; got 500\.$"):
        list(hide(space, session, [500], 2, 0, LIBRARY))
    assert not session.busy and space.trials._room.acquire(blocking=False)


def test_stop_keeps_what_is_there(space):
    session = filled(space, TEXT)
    states = hide(space, session, [500, 1000], 3, 0, LIBRARY)
    seen = next(state for state in states if len(state.cells) == 2)
    session.end_trial()
    *_, last = states
    assert last.state == "stopped" and last.cells == seen.cells and not session.busy
    assert not session.halt.exists()


def test_cutting_texts_takes_no_turn_and_a_question_is_answered_between_steps(space):
    session, asker = filled(space, TEXT), filled(space, SEINE)
    states, found = hide(space, session, [500, 1000], 2, 0, LIBRARY), []

    def steps():
        with space.engine.turns.of("another"):
            found.append(next(states))
            found.append(next(states))  # the texts are cut

    worker = threading.Thread(target=steps, daemon=True)
    worker.start()
    worker.join(HANG)
    assert [state.total > 0 for state in found] == [False, True]
    for _ in range(3):
        next(states)
        worker = threading.Thread(
            target=lambda: found.append(list(ask(space.engine, space.limits, asker, "Which river?"))[-1]),
            daemon=True,
        )
        worker.start()
        worker.join(HANG)
        assert found.pop().state == "done"
    assert list(states)[-1].state == "done"


def test_the_pace_is_measured_and_then_learned(space):
    assert space.trials.pace == Pace()
    space.trials.measure()
    first = space.trials.pace
    assert first.cut > 0 and first.read > 0 and first.asked is None
    list(hide(space, filled(space, TEXT), [500], 1, 0, LIBRARY))
    learned = space.trials.pace
    assert learned.asked > 0 and learned.read != first.read


def test_how_long_it_takes():
    plan = Needles((500, 1000), (0.0, 1.0))
    assert reading_seconds(plan, Pace()) is None
    assert reading_seconds(plan, Pace(0.25, 0.5)) == 1000 * 0.75
    assert reading_seconds(replace(plan, total=1200, tokens=200), Pace(0.25, 0.5)) == 1000 * 0.5
    pytest.importorskip("gradio")
    from msa_hf.space_app.needle_tab import estimated

    assert estimated(plan, Pace()) == "1,000 tokens to read, 4 facts to ask for."
    assert estimated(plan, Pace(0.0, 0.01)) == (
        "About 10 s to read 1,000 tokens (100 a second, measured here), and the time of 4 facts."
    )
    assert estimated(plan, Pace(0.0, 0.01, 2.0)).startswith("About 18 s: 10 s to read 1,000 tokens")


# What is shown


class Tags(HTMLParser):
    """Tags, attributes and the text of what was rendered."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data

    def classes(self, name):
        return sum(key == "class" and name in value.split() for key, value in self.attributes)


def cell(length=500, depth=0.0, **more):
    words = {"kind": "place", "fact": "f", "question": "Where?", "expected": "Here", "answer": "There"}
    own = NeedleCell(
        length, depth, 501, 9, **words, found=False, document=3, selected=False, rank=None, router_rank=4,
        seconds=1.5, encoding_seconds=0.1,
    )  # fmt: skip
    return replace(own, **more)


def test_the_map_has_every_place_from_the_start(space):
    plan = planned(space, [500, 1000], 3)
    cells = (
        cell(),
        cell(depth=0.5, found=True, selected=True, rank=1),
        cell(depth=1.0, selected=True, rank=2),
    )
    for count in range(4):
        shown = Tags(needle_map(replace(plan, cells=cells[:count])))
        assert shown.tags.count("td") == 6 and shown.tags.count("button") == count
        assert shown.classes("msa-open") == 6 - count + 1  # one in the legend
    assert [shown.classes(f"msa-{kind}") for kind in ("found", "untold", "lost")] == [2, 2, 2]
    assert shown.text.count("✓") == shown.text.count("◐") == shown.text.count("✕") == 2
    assert "1 of 3 facts found: 33 %" in shown.text and "1k" in shown.text
    lines = Tags(needle_table(replace(plan, cells=cells)))
    targets = [value for key, value in shown.attributes if key == "data-line"]
    assert sorted(targets) == sorted(value for key, value in lines.attributes if key == "id")
    assert "Where?" in lines.text and "expected Here" in lines.text and "said There" in lines.text


def test_progress_in_words():
    plan = Needles((500, 1000), (0.0, 1.0), state="running")
    assert "Cutting the texts" in progress_panel(plan)
    plan = replace(plan, total=1000, tokens=600)
    assert "Reading into memory, for 500 tokens" in progress_panel(plan)
    shown = progress_panel(replace(plan, cells=(cell(),), seconds_left=90.0, seconds=30.0))
    assert "Asking at 500 tokens, depth 100%" in shown and "about 2 min left" in shown
    assert "1 of 4 facts asked" in shown and "600 of 1,000 tokens read" in shown and "width:42.50%" in shown
    for state, text in (("waiting", "other visitors"), ("done", "Done"), ("late", "Time is over")):
        assert text in progress_panel(replace(plan, state=state))


def test_untrusted_text_stays_text():
    own = cell(question=MARKUP, expected=MARKUP, answer=MARKUP)
    state = Needles((500,), (0.0,), cells=(own,), state="done")
    allowed = set("div table caption thead tbody tr th td button p span i b small q ul li".split())
    for html in (needle_map(state), needle_table(state), progress_panel(state), ready_panel(MARKUP)):
        shown = Tags(html)
        assert set(shown.tags) <= allowed and "${" not in html
        assert {key for key, _ in shown.attributes} <= set(
            "class scope title type data-line id tabindex role aria-label style".split()
        )
    assert Tags(needle_table(state)).text.count(MARKUP) == 3


def test_with_zerogpu_a_test_ends_before_its_gpu_is_taken_back(tmp_path, monkeypatch, model, tiny_tokenizer):
    monkeypatch.setattr(trials, "lends", lambda: True)
    space = Space(model, tiny_tokenizer, "tiny", tmp_path / "state", LIMITS, portion_tokens=10_000)
    left = []

    def noted(function):
        def note(*words):
            left.append(words[-1] - time.monotonic())
            return function(*words)

        return note

    for name in ("_hide", "_compare"):
        monkeypatch.setattr(space.trials, name, noted(getattr(space.trials, name)))
    session = filled(space, TEXT)
    space.trials.measure()
    assert space.trials.pace == Pace()  # nothing is lent for it
    assert list(hide(space, session, [500], 1, 0, LIBRARY))[-1].state == "done"
    assert list(compare(space, session, "Which river?", 200))[-1].state == "done"
    assert len(left) == 2 and all(0 < own <= gpu.SECONDS - trials.MARGIN for own in left)
