"""The Needle tab: facts hidden in long texts, and which of them the model finds again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.modeling.errors import MSAError

from . import rendering
from .needle_view import needle_map, needle_table, progress_panel
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
    '<p class="msa-hint">One made-up sentence is hidden in a real text, at the beginning, in the middle, at the end. '
    "The text becomes a memory, and the model is asked for the fact. The longer the text, the harder.</p>"
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
    with gr.Row(equal_height=True):
        estimate = gr.HTML('<p class="msa-hint msa-line"></p>')
        begin = gr.Button("Hide and ask", variant="primary", scale=0, min_width=150)
        stop = gr.Button("Stop", scale=0, min_width=80, interactive=False)
    message = gr.HTML()
    progress = gr.HTML(progress_panel(None))
    shown_map = gr.HTML(needle_map(planned(space, [known[name] for name in first], DEPTHS)))
    table = gr.HTML(needle_table(Needles()))

    def plan(names: list[str], many: float, number: float | None, where: str) -> Needles:
        return planned(space, [known[name] for name in names], int(many), int(number or 0), where)

    def told(session: Session, names: list[str], many: float, number: float | None, where: str) -> str:
        try:
            text = estimated(plan(names, many, number, where), space.trials.pace(session.name))
        except MSAError as error:
            text = str(error)
        return f'<p class="msa-hint msa-line">{rendering.safe(text)}</p>'

    def changed(value: str, names: list[str], many: float, number: float | None, where: str) -> tuple:
        session = page.session(value)
        kept = gr.skip()
        if not session.trying.locked():
            try:
                kept = needle_map(plan(names, many, number, where))
            except MSAError:
                kept = gr.skip()  # the estimate's line says why
        return told(session, names, many, number, where), kept

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
                )
        except MSAError as error:
            running = session.trying.locked()
            refused = rendering.note(str(error), "bad")
            panel = gr.skip() if running else progress_panel(None)
            yield refused, panel, gr.skip(), gr.skip(), gr.update(interactive=running)

    choices = [lengths, depths, seed, texts]
    outputs = [message, progress, shown_map, table, stop]
    begin.click(hidden, [key, *choices], outputs, concurrency_id="trying", concurrency_limit=8, **_PRIVATE)
    stop.click(lambda value: page.session(value).end_trial(), [key], None, **_PRIVATE)
    for component in (lengths, depths, texts):
        component.change(
            changed, [key, *choices], [estimate, shown_map], trigger_mode="always_last", **_PRIVATE
        )
    page.show(lambda session: told(session, first, DEPTHS, 0, ARTICLES), [estimate])


def estimated(plan: Needles, pace: Pace) -> str:
    """How long a test takes here, from what was measured here."""
    facts, tokens, reading = plan.all_cells, plan.lengths[-1], reading_seconds(plan, pace)
    many = f"{facts} fact{'s' * (facts != 1)}"
    if reading is None:
        return f"{tokens:,} tokens to read, {many} to ask for."
    read = f"{rendering.duration(reading)} to read {tokens:,} tokens ({tokens / reading:,.0f} a second, measured here)"
    if pace.asked is None:
        return f"About {read}, and the time of {many}."
    whole = rendering.duration(reading + facts * pace.asked)
    return f"About {whole}: {read}, and {many} at {pace.asked:.1f} s each."
