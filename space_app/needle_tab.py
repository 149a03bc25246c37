"""The Needle tab: facts hidden in long texts, and which of them the model finds again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.modeling.errors import MSAError

from . import rendering
from .needle_view import CHOOSE, needle_map, needle_table, progress_panel, ready_panel
from .needles import (
    ARTICLES,
    LENGTHS,
    MOST_DEPTHS,
    MOST_SEED,
    TEXTS,
    Needles,
    hide,
    longest,
    planned,
    reading_seconds,
)
from .sessions import Session
from .trials import Pace

if TYPE_CHECKING:
    from .page import Page

NAME = "Needle"
CHOSEN, DEPTHS = (1_000, 3_000, 10_000), 5
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_HINT = (
    '<p class="msa-hint">A made-up sentence is hidden in a real text: at its beginning, in the middle, at '
    "its end. The text becomes a memory, and the model is asked for the fact. The longer the text, the "
    "harder.</p>"
)


def build(page: Page) -> None:
    """Puts the tab's components and events into the page that is being built."""
    space, key = page.space, page.key
    known = {f"{length:,}": length for length in LENGTHS if length <= longest(space)}
    first = [name for name, length in known.items() if length in CHOSEN]
    gr.HTML(_HINT)
    lengths = gr.CheckboxGroup(list(known), value=first, label="Tokens of the text")
    with gr.Row():
        depths = gr.Slider(1, MOST_DEPTHS, DEPTHS, step=1, label="Depths", min_width=160)
        texts = gr.Radio(list(TEXTS), value=ARTICLES, label="Hidden in", min_width=220)
        seed = gr.Number(
            0,
            precision=0,
            minimum=0,
            maximum=MOST_SEED,
            label="Seed (another one, other facts)",
            min_width=160,
        )
    with gr.Row():
        begin = gr.Button("Hide and ask", variant="primary", scale=3, min_width=150)
        stop = gr.Button("Stop", scale=1, min_width=80, interactive=False)
    message = gr.HTML()
    start = planned(space, [known[name] for name in first], DEPTHS)
    space.trials.measure()  # while the app starts, so that no visitor waits for it
    progress = gr.HTML(ready_panel(estimated(start, space.trials.pace)))
    shown_map = gr.HTML(needle_map(start), js_on_load=CHOOSE)
    table = gr.HTML(needle_table(start))
    ran = gr.State(False)  # then the map shows what was found, not what is chosen

    def plan(names: list[str], many: float, number: float | None, where: str) -> Needles:
        return planned(space, [known[name] for name in names], int(many), int(number or 0), where)

    def told(session: Session, names: list[str], many: float, number: float | None, where: str) -> str:
        try:
            text = estimated(plan(names, many, number, where), space.trials.pace)
        except MSAError as error:
            text = str(error)
        return ready_panel(text)

    def changed(value: str, names: list[str], many: float, number: float | None, where: str, kept: bool):
        session = page.session(value)
        if session.trying.locked():
            return gr.skip(), gr.skip()
        if kept:
            return told(session, names, many, number, where), gr.skip()
        try:
            empty = needle_map(plan(names, many, number, where))
        except MSAError:  # what is ready says why
            empty = gr.skip()
        return told(session, names, many, number, where), empty

    def hidden(value: str, names: list[str], many: float, number: float | None, where: str):
        session = page.session(value)
        try:
            chosen = [known[name] for name in names]
            for state in hide(space, session, chosen, int(many), int(number or 0), where):
                ended = state.state not in ("waiting", "running")
                yield (
                    "",
                    progress_panel(state),
                    needle_map(state),
                    needle_table(state),
                    gr.update(interactive=not ended),
                    True,
                )
        except MSAError as error:
            running = session.trying.locked()
            refused = rendering.note(str(error), "bad")
            panel = gr.skip() if running else told(session, names, many, number, where)
            yield refused, panel, gr.skip(), gr.skip(), gr.update(interactive=running), gr.skip()

    choices = [lengths, depths, seed, texts]
    outputs = [message, progress, shown_map, table, stop, ran]
    begin.click(hidden, [key, *choices], outputs, concurrency_id="trying", concurrency_limit=8, **_PRIVATE)
    stop.click(lambda value: page.session(value).end_trial(), [key], None, **_PRIVATE)
    for component in (lengths, depths, texts):
        component.change(
            changed, [key, *choices, ran], [progress, shown_map], trigger_mode="always_last", **_PRIVATE
        )


def estimated(plan: Needles, pace: Pace) -> str:
    """How long a test takes here, from what was measured here."""
    facts, tokens, reading = plan.all_cells, plan.lengths[-1], reading_seconds(plan, pace)
    many = f"{facts} fact{'s' * (facts != 1)}"
    if reading is None:
        return f"{tokens:,} tokens to read, {many} to ask for."
    rate = f"{tokens / reading:,.0f} a second, measured here"
    read = f"{rendering.duration(reading)} to read {tokens:,} tokens ({rate})"
    if pace.asked is None:
        return f"About {read}, and the time of {many}."
    whole = rendering.duration(reading + facts * pace.asked)
    return f"About {whole}: {read}, and {many} at {pace.asked:.1f} s each."
