"""The Compression tab: one question with the dense cache and with smaller ones, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.evaluation.cache_curves import shipped_results
from msa_hf.modeling.errors import MSAError

from . import rendering
from .adding import MARKS, QUESTIONS
from .comparison import EMPTY, LEAST, USUAL, Comparison, compare
from .compression_view import comparison_rows, progress_line
from .curves_plot import curves
from .library import Row
from .question_row import question_row
from .sessions import Session

if TYPE_CHECKING:
    from .page import Page

NAME = "Compression"
EXAMPLES, LONGEST_EXAMPLE = 3, 120  # questions that are offered, and their characters
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_HINT = (
    '<p class="msa-hint">A key/value cache holds what the model has read. Here it reads passages of your '
    "library with a dense cache, then with caches of fewer bits per number, and answers each time. Words "
    "that the dense cache's answer does not have are marked.</p>"
)


def build(page: Page) -> None:
    """Puts the tab's components and events into the page that is being built."""
    space, key = page.space, page.key
    most = space.limits.comparison_tokens
    gr.HTML(_HINT)
    question, begin, stop = question_row(
        space.limits, "msa-comparison", "A question about your documents", "Compare"
    )
    with gr.Row():
        examples = [gr.Button("", size="sm", visible=False, min_width=160) for _ in range(EXAMPLES)]
    with gr.Accordion("How much to read", open=False):
        tokens = gr.Slider(
            min(LEAST, most), most, min(USUAL, most), step=1, label="Tokens of the prompt, at most"
        )
    message = gr.HTML()
    line = gr.HTML(progress_line(None))
    rows = gr.HTML(comparison_rows(Comparison()))
    gr.HTML(curves(shipped_results()))

    def shown(session: Session) -> tuple:
        found = session.library.rows()
        texts = example_questions(found, [turn.question for turn in session.history.turns])
        buttons = [gr.update(value=text, visible=True) for text in texts]
        buttons += [gr.update(visible=False)] * (EXAMPLES - len(texts))
        return rendering.note(EMPTY) if not found else "", *buttons

    def compared(value: str, text: str, most_tokens: float):
        session = page.session(value)
        try:
            for state in compare(space, session, text, int(most_tokens)):
                ended = state.state not in ("waiting", "running")
                yield "", progress_line(state), comparison_rows(state), gr.update(interactive=not ended)
        except MSAError as error:
            refused = rendering.note(str(error), "bad")
            running = session.trying.locked()
            yield (
                refused,
                gr.skip() if running else progress_line(None),
                gr.skip(),
                gr.update(interactive=running),
            )

    runs = {"concurrency_id": "trying", "concurrency_limit": 8, **_PRIVATE}
    for trigger in (begin.click, question.submit):
        trigger(compared, [key, question, tokens], [message, line, rows, stop], **runs)
    for button in examples:
        button.click(lambda text: text, [button], [question], queue=False, **_PRIVATE).then(
            compared, [key, button, tokens], [message, line, rows, stop], **runs
        )
    stop.click(lambda value: page.session(value).end_trial(), [key], None, **_PRIVATE)
    page.show(shown, [message, *examples])


def example_questions(rows: list[Row], asked: list[str]) -> list[str]:
    """Questions to a library: the last that were asked, those of its examples, one about a document."""
    names = {row.name for row in rows}
    known = [text for example, texts in QUESTIONS.items() if MARKS[example] in names for text in texts]
    own = [text for text in reversed(asked) if len(text) <= LONGEST_EXAMPLE]
    about = [f"What is {(row.title or row.name)[:LONGEST_EXAMPLE]} about?" for row in rows[:1]]
    return list(dict.fromkeys([*own[:2], *known, *about]))[:EXAMPLES] if rows else []
