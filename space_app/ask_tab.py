"""The Ask tab: a conversation with the library, each answer with what it was read from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.modeling.errors import MSAError

from . import rendering
from .adding import MARKS, QUESTIONS
from .question_row import question_row
from .questions import MOST_DOCUMENTS, MOST_ROUNDS, ask
from .sessions import Session

if TYPE_CHECKING:
    from .page import Page

NAME = "Ask"
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
# Brings a question to the top of the window as soon as it is there; its answer and sources grow below it.
SCROLL = """text => {
  const live = document.getElementById("msa-live");
  new MutationObserver((_, watch) => {
    if (!live.querySelector(".msa-turn")) return;
    watch.disconnect();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    live.scrollIntoView({block: "start", behavior: still ? "auto" : "smooth"});
  }).observe(live, {childList: true, subtree: true});
  return text;
}"""


def build(page: Page) -> None:
    """Puts the tab's components and events into the page that is being built."""
    space, key = page.space, page.key
    log = gr.HTML(elem_classes="msa-log")
    live = gr.HTML(elem_id="msa-live")
    message = gr.HTML()
    question, send, stop = question_row(
        space.limits, "msa-question", "Ask about your documents, and press Enter", "Ask"
    )
    with gr.Row():
        examples = [
            gr.Button(text, size="sm", visible=False, min_width=160)
            for texts in QUESTIONS.values()
            for text in texts
        ]
    with gr.Accordion("How to search", open=False):
        with gr.Row():
            way = gr.Dropdown(space.engine.ways, value=space.engine.ways[0], label="Passages are found by")
            k = gr.Slider(0, MOST_DOCUMENTS, 0, step=1, label="Passages at most (0: the usual)")
            rounds = gr.Slider(0, MOST_ROUNDS, 0, step=1, label="Rounds at most (0: the usual)")
    fresh = gr.Button("New conversation", size="sm")

    def shown(session: Session) -> tuple:
        names = {row.name for row in session.library.rows()}
        turns = session.history.turns
        visible = [
            not turns and MARKS[example] in names for example, texts in QUESTIONS.items() for _ in texts
        ]
        return (
            rendering.conversation(turns, empty_library=not names),
            "",
            *(gr.update(visible=v) for v in visible),
        )

    def answer(value: str, text: str, way: str, k: float, rounds: float):
        session = page.session(value)
        hidden = [gr.update(visible=False)] * len(examples)
        kept = [gr.skip()] * len(examples)
        try:
            before = session.history.turns
            earlier = rendering.conversation(before, opened=False) if before else ""
            for turn in ask(space.engine, space.limits, session, text, way, int(k), int(rounds)):
                first = turn.state == "waiting"
                above, buttons = (earlier, hidden) if first else (gr.skip(), kept)
                yield above, rendering.turn_block(turn), "", gr.update(interactive=True), *buttons
            yield rendering.conversation(session.history.turns), "", "", gr.update(interactive=False), *kept
        except MSAError as error:
            refused = rendering.note(str(error), "bad")
            yield gr.skip(), "", refused, gr.update(interactive=False), *kept

    def forgotten(value: str) -> tuple:
        session = page.session(value)
        session.history.clear()
        return *shown(session), ""

    def stopped(value: str) -> None:
        session = page.session(value)
        if session.asking.locked():
            session.stop.touch()

    asks = {"concurrency_id": "asking", "concurrency_limit": 32, **_PRIVATE}
    outputs = [log, live, message, stop, *examples]
    waiting = gr.State("")

    def taken(text: str) -> tuple[str, str]:
        return text, ""

    for trigger in (send.click, question.submit):
        trigger(taken, [question], [waiting, question], queue=False, js=SCROLL, **_PRIVATE).then(
            answer, [key, waiting, way, k, rounds], outputs, **asks
        )
    for button in examples:
        button.click(lambda: None, js=SCROLL, queue=False, **_PRIVATE).then(
            answer, [key, button, way, k, rounds], outputs, **asks
        )
    stop.click(stopped, [key], None, **_PRIVATE)
    fresh.click(forgotten, [key], [log, live, *examples, message], **_PRIVATE)
    page.show(shown, [log, live, *examples])
