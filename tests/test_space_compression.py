"""The Compression tab without a browser: what it compares, its limits, its turns, and what it shows."""

import re
import threading
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest
from space_cases import HANG, MARKUP, NILE, SEINE, Clock, space_model

from msa_hf import MemoryStore
from msa_hf.documents import Document
from msa_hf.evaluation.cache_comparison import SYSTEMS, CacheAnswer, compare_caches
from msa_hf.evaluation.cache_curves import cache_curves, shipped_results
from msa_hf.space_app import trials
from msa_hf.space_app.comparison import EMPTY, NAMES, Comparison, compare
from msa_hf.space_app.compression_view import comparison_rows, marked, progress_line
from msa_hf.space_app.curves_plot import FRAMES, curves
from msa_hf.space_app.library import Row
from msa_hf.space_app.limits import Limits
from msa_hf.space_app.questions import ask
from msa_hf.space_app.refusals import Refused
from msa_hf.space_app.space import Space

LIMITS = Limits(
    piece_tokens=64,
    answer_tokens=4,
    comparison_tokens=600,
    trials=1,
    trials_per_minute=4,
    question_characters=200,
)
QUESTION = "Which river flows through Cairo?"
TIMES = ("prefill_seconds", "seconds_per_token", "speed")


@pytest.fixture(scope="module")
def model():
    return space_model()


@pytest.fixture
def space(tmp_path, model, tiny_tokenizer):
    space = Space(model, tiny_tokenizer, "tiny", tmp_path / "state", LIMITS, portion_tokens=64, clock=Clock())
    yield space
    space.close()


def filled(space, text=NILE, count=9):
    session = space.sessions.new()
    documents = [
        Document(f"n{i}", "", f"{text} Number {i}.", f"n{i}", {"kind": "text"}) for i in range(count)
    ]
    list(session.library.add(documents))
    return session


def timeless(answer):
    return {own.name: getattr(answer, own.name) for own in fields(answer) if own.name not in TIMES}


def in_time(function):
    """The result of a function that might wait for ever."""
    found = []
    worker = threading.Thread(target=lambda: found.append(function()), daemon=True)
    worker.start()
    worker.join(HANG)
    assert found, "it still waits"
    return found[0]


def test_the_answers_are_those_of_the_engine_from_the_visitors_own_library(space, model, tiny_tokenizer):
    other, session = filled(space, SEINE), filled(space)
    states = list(compare(space, session, QUESTION, 400))
    assert [len(state.answers) for state in states] == [0, 1, 2, 3, 4, 5, 6, 6]
    last = states[-1]
    assert last.state == "done" and [own.system for own in last.answers] == list(SYSTEMS)
    assert last.answers[1].packed_tokens > 0  # else all caches would answer alike
    prompts = []
    for own in (session, other):
        with MemoryStore.open(own.library.store, model, tiny_tokenizer, read_only=True) as store:
            plain = compare_caches(
                model, tiny_tokenizer, QUESTION, store.bank(), SYSTEMS[:3], context_tokens=400
            )
            prompts.append([timeless(answer) for answer in plain])
    assert [timeless(answer) for answer in last.answers[:3]] == prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("question", "tokens", "message"),
    [
        (" ", 0, "Type a question"),
        ("x" * 201, 0, "201 characters; it may have 200"),
        (QUESTION, 601, "from 128 to 600; got 601"),
        (QUESTION, 127, "from 128 to 600; got 127"),
        (QUESTION, 2.5, "got 2.5"),
    ],
)
def test_what_is_refused_names_its_limit(space, question, tokens, message):
    session = filled(space, count=1)
    with pytest.raises(Refused, match=re.escape(message)):
        next(compare(space, session, question, tokens))
    assert not session.busy


def test_an_empty_library_is_told_what_to_do(space):
    session = space.sessions.new()
    with pytest.raises(Refused) as error:
        next(compare(space, session, QUESTION))
    assert str(error.value) == EMPTY and "Library tab" in EMPTY


def test_one_test_at_a_time_and_few_a_minute(space):
    session = filled(space, count=1)
    for _ in range(LIMITS.trials_per_minute):
        running = compare(space, session, QUESTION)
        next(running)
        with pytest.raises(Refused, match="still running"):
            next(compare(space, session, QUESTION))
        running.close()
        assert not session.busy
    with pytest.raises(Refused, match="At most 4 tests a minute"):
        next(compare(space, session, QUESTION))
    assert not session.busy


def test_stop_keeps_what_is_there(space):
    session = filled(space)
    states = compare(space, session, QUESTION)
    seen = [next(states) for _ in range(3)]
    assert len(seen[-1].answers) == 2
    session.end_trial()
    *_, last = states
    assert last.state == "stopped" and last.answers == seen[-1].answers
    assert not session.busy and not session.halt.exists()
    session.end_trial()  # with nothing running it leaves no mark for the next one
    assert not session.halt.exists()


def test_a_test_ends_when_its_time_is_over(space, monkeypatch):
    session = filled(space)
    monkeypatch.setattr(space.trials, "_deadline", lambda: 0.0)
    *_, last = compare(space, session, QUESTION)
    assert last.state == "late" and not last.answers and not session.busy


def test_a_question_is_answered_between_two_steps(space):
    session, asker = filled(space), filled(space, SEINE, 1)
    states = compare(space, session, QUESTION)
    next(states), next(states)
    *_, turn = in_time(lambda: list(ask(space.engine, space.limits, asker, "Which river?")))
    assert turn.state == "done"
    *_, last = states
    assert last.state == "done"


def test_a_test_waits_for_those_of_others_and_can_be_stopped_meanwhile(space, monkeypatch):
    monkeypatch.setattr(trials, "WAIT", 0.0)
    first, second = filled(space, count=1), filled(space, count=1)
    running, waiting = compare(space, first, QUESTION), compare(space, second, QUESTION)
    assert next(running).state == "running"
    assert [next(waiting).state for _ in range(3)] == ["waiting"] * 3
    second.end_trial()
    *_, last = waiting
    assert last.state == "stopped" and not last.answers
    waiting = compare(space, second, QUESTION)
    assert next(waiting).state == "waiting"
    running.close()
    assert next(waiting).state == "running" and len(next(waiting).answers) == 1
    waiting.close()
    assert space.trials._room.acquire(blocking=False)  # everyone has given back what they took


def test_the_prompt_without_an_end_is_an_error_in_words(space, monkeypatch):
    session = filled(space, count=1)

    def broken(*words, **options):
        raise ValueError("the prompt must have 3 tokens")

    monkeypatch.setattr(trials, "compare_caches", broken)
    with pytest.raises(Refused, match=r"^The prompt must have 3 tokens\.$"):
        list(compare(space, session, QUESTION))
    assert not session.busy


# What is shown


class Tags(HTMLParser):
    """Tags, attributes and the text of what was rendered."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.names, self.text, self.marks = [], set(), "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}
        if tag == "mark":
            self.marks.append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] == "mark" and not self.marks[-1]:
            self.marks[-1] = data


def answer(system="dense", text="The Nile.", packed=320, **more):
    sizes = {"total": 2000, "bfloat16": 1000, "reserved": 0}
    if system != "dense":
        parts = {
            "codes": 100,
            "scales": 20,
            "means": 5,
            "window": 300,
            "exact": 10,
            "transforms": 30,
            "other": 1,
        }
        sizes = {"total": sum(parts.values()) + 7, "bfloat16": 1000, "reserved": 7, **parts}
    own = CacheAnswer(
        system, text, text == "The Nile.", 0.0123, 0.875, 96, 469, packed, 4.16, sizes, 0.1, 0.01, 0.85
    )
    return replace(own, **more)


def test_rows_have_their_place_before_there_is_an_answer():
    answers = [answer(), *(answer(name) for name in SYSTEMS[1:])]
    for count in range(len(SYSTEMS) + 1):
        shown = Tags(comparison_rows(Comparison(QUESTION, SYSTEMS, tuple(answers[:count]), "running")))
        assert shown.tags.count("li") == len(SYSTEMS) and shown.tags.count("dd") == 4 * len(SYSTEMS)
        assert all(name in shown.text for name in NAMES.values())
        assert shown.text.count("The Nile.") == count
        assert shown.text.count("Reading") == (count < len(SYSTEMS))
    assert "0.0123" in shown.text and "87.5 %" in shown.text and "0.85×" in shown.text
    assert "473 bytes 47 % of bfloat16" in shown.text and "320 of them read from codes" in shown.text
    assert "noisy" in shown.text


def test_words_that_the_dense_answer_does_not_have_are_marked():
    assert Tags(marked("The Seine in Paris.", "The Nile in Cairo.")).marks == ["Seine", "Paris"]
    assert Tags(marked("the Nile", "the Nile.")).marks == []
    assert Tags(marked("The Nile.", "The Nile.")).marks == []
    assert Tags(marked("The long Nile.", "The Nile.")).text == "The long Nile."


def test_rows_say_whether_the_words_are_the_same():
    answers = (answer(), answer("4bit", same_answer=False), answer("3bit", "The Seine."))
    shown = Tags(comparison_rows(Comparison(QUESTION, SYSTEMS, answers, "running"))).text
    assert shown.count("same answer") == 1 and shown.count("differs") == 1


@pytest.mark.parametrize(("packed", "told"), [(0, True), (64, False)])
def test_a_short_prompt_is_told_that_nothing_is_packed(packed, told):
    state = Comparison(QUESTION, SYSTEMS, (answer(packed=0), answer("4bit", packed=packed)), "running")
    assert ("Nothing is packed yet" in Tags(comparison_rows(state)).text) is told
    assert "Nothing is packed" not in comparison_rows(replace(state, answers=state.answers[:1]))


@pytest.mark.parametrize(
    ("state", "count", "text"),
    [
        ("waiting", 0, "other visitors"),
        ("running", 0, "Dense is reading the prompt (1 of 6)"),
        ("running", 2, "3 bits is reading the prompt (3 of 6)"),
        ("done", 6, "Done. 6 of 6"),
        ("stopped", 2, "Stopped. 2 of 6"),
        ("late", 1, "Time is over. 1 of 6"),
    ],
)
def test_progress_in_words(state, count, text):
    answers = tuple(answer(name) for name in SYSTEMS[:count])
    assert text in Tags(progress_line(Comparison(QUESTION, SYSTEMS, answers, state))).text


def test_untrusted_text_stays_text():
    state = Comparison(MARKUP, SYSTEMS, (answer(text=MARKUP), answer("4bit", f"{MARKUP} x")), "done")
    shown = Tags(comparison_rows(state))
    assert set(shown.tags) <= set("ol li div b small p i s dl dt dd span mark".split())
    assert shown.names <= {"class", "tabindex", "style", "title", "role"}
    assert f"{MARKUP} x" in shown.text and "${" not in comparison_rows(state)


def test_example_questions_are_about_the_library():
    pytest.importorskip("gradio")
    from msa_hf.space_app.adding import OWN, QUESTIONS
    from msa_hf.space_app.compression_tab import example_questions

    row = Row("a.txt", "Rivers", "text", 1, 10)
    assert example_questions([], ["asked"]) == []
    assert example_questions([row], []) == ["What is Rivers about?"]
    assert example_questions([row], ["a?", "b?", "c?"]) == ["c?", "b?", "What is Rivers about?"]
    assert example_questions([replace(row, name=OWN)], []) == QUESTIONS[OWN]


def test_every_measured_point_is_drawn_where_it_belongs():
    results = shipped_results()
    drawn = curves(results)
    points = [point for curve in cache_curves(results) for point in curve.points]
    for frame in FRAMES:
        svg = re.search(rf'<svg class="msa-plot msa-{frame.name}".*?</svg>', drawn)[0]
        marks = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)" d="[^"]+"><title>([^:]+):', svg)
        assert sorted(name for *_, name in marks) == sorted(point.system for point in points)
        where = {name: (float(x), float(y)) for x, y, name in marks}
        ticks = dict(
            (float(text), float(x)) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*middle">(\d+)<', svg)
        )
        heights = dict(
            (float(text), float(y) - 4)
            for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
        )
        for point in points:
            x, y = where[point.system]
            assert 0 < x < frame.width and 0 < y < frame.height
            for bits, place in ticks.items():
                assert (point.bits < bits) == (x < place)
            for kl, place in heights.items():
                assert (point.kl < kl) == (y > place)
        halfway = (ticks[2.0] + ticks[8.0]) / 2
        assert halfway == pytest.approx(ticks[4.0], abs=0.2)  # logarithmic
    told = Tags(drawn).text
    for field in ("command", "machine", "date", "model"):
        assert results[field] in told
