"""The Library tab: documents come in, are listed, changed and removed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.modeling.errors import MSAError

from . import rendering
from .adding import OWN, WIKIPEDIA, add_example, add_files, add_text, update_text
from .library import Progress
from .sessions import Session
from .uploads import SUFFIXES

if TYPE_CHECKING:
    from .page import Page

NAME = "Library"
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_HINT = (
    '<p class="msa-hint">Drop a book here: .txt, .md, .html, .pdf, source code, or a .zip of these. A file '
    "of the same name replaces the one that is there.</p>"
)


def build(page: Page) -> None:
    """Puts the tab's components and events into the page that is being built."""
    space, key = page.space, page.key
    meter = gr.HTML()
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            gr.HTML(_HINT)
            files = gr.File(
                show_label=False,
                file_count="multiple",
                file_types=sorted(SUFFIXES),
                height=150,
                elem_id="msa-files",
            )
        with gr.Column(scale=2, min_width=300):
            gr.HTML('<p class="msa-hint">Or write one yourself:</p>')
            with gr.Accordion("Paste a text", open=False):
                title = gr.Textbox(
                    label="Title", max_length=100, placeholder="Of the note; the same title replaces it"
                )
                text = gr.Textbox(label="Text", lines=5, max_lines=12, placeholder="Paste or write here")
                paste = gr.Button("Add this text", variant="primary")
            gr.HTML('<p class="msa-hint">Or begin with an example:</p>')
            with gr.Row():
                own = gr.Button(OWN, size="sm")
                wikipedia = gr.Button(WIKIPEDIA, size="sm")
    with gr.Row(equal_height=True):
        progress = gr.HTML(rendering.progress_panel(None))
    cancel = gr.Button("Stop adding, keep what is done", visible=False, size="sm", variant="stop")
    message = gr.HTML()
    search = gr.Textbox(label="Search the documents", placeholder="words of a name or title", max_length=200)
    table = gr.HTML()
    chosen = gr.Dropdown([], multiselect=True, allow_custom_value=True, label="Choose documents")
    with gr.Row():
        delete = gr.Button("Delete", scale=1, min_width=80)
        edit = gr.Button("Edit", scale=1, min_width=80)
        forget = gr.Button("Forget…", scale=1, min_width=80, elem_classes="msa-danger")
        undo = gr.Button("Undo", scale=1, min_width=80, interactive=False)
        redo = gr.Button("Redo", scale=1, min_width=80, interactive=False)
    with gr.Group(visible=False) as confirming:
        gr.HTML(
            rendering.note(
                "Forget erases the chosen documents from every file. They cannot be brought back, and no "
                "earlier change can be undone any more.",
                "bad",
            )
        )
        with gr.Row():
            sure = gr.Button("Erase for good", variant="stop")
            keep = gr.Button("Keep them")
    with gr.Group(visible=False) as editing:
        edited = gr.Textbox(label="Text of the document", lines=10, max_lines=24)
        with gr.Row():
            save = gr.Button("Save", variant="primary")
            leave = gr.Button("Leave as it was")

    outputs = [meter, table, chosen, undo, redo]

    def state(session: Session, words: str = "") -> tuple:
        library = session.library
        rows = library.rows()
        found = library.rows(words) if words and words.strip() else rows
        return (
            rendering.meter_panel(library.meter()),
            rendering.document_table(found, found is not rows),
            gr.update(choices=[row.name for row in rows], value=[]),
            gr.update(interactive=library.undoable > 0),
            gr.update(interactive=library.redoable > 0),
        )

    def seen(session: Session, words: str) -> tuple:
        """As `state`, for a tab that comes into sight: what was chosen stays, as this may arrive later."""
        panel, listed, choice, *buttons = state(session, words)
        return panel, listed, {name: value for name, value in choice.items() if name != "value"}, *buttons

    def adding(session: Session, portions: Iterator[Progress]):
        """Shows what is added while it is; the message and the list at the end."""
        waiting = (gr.skip(),) * len(outputs)
        try:
            yield rendering.progress_panel(Progress(0, 0, 0, 0, 0.0)), gr.update(visible=True), "", *waiting
            last = None
            for last in portions:
                shown = (
                    waiting if last.ended else (rendering.meter_panel(session.library.meter()), *waiting[1:])
                )
                yield rendering.progress_panel(last), gr.skip(), gr.skip(), *shown
            yield gr.skip(), gr.update(visible=False), "", *state(session)
        except MSAError as error:
            yield (
                rendering.progress_panel(None),
                gr.update(visible=False),
                rendering.note(str(error), "bad"),
                *state(session),
            )

    def changed(session: Session, words: str, change, done: str) -> tuple:
        try:
            change()
            text, kind = done, "good"
        except MSAError as error:
            text, kind = str(error), "bad"
        return rendering.note(text, kind), *state(session, words)

    adds = {"concurrency_id": "adding", "concurrency_limit": 8, **_PRIVATE}
    adding_outputs = [progress, cancel, message, *outputs]

    def upload(value: str, paths: list[str] | None):
        if paths:
            session = page.session(value)
            yield from adding(session, add_files(space, session, paths))

    def pasted(value: str, own_title: str, own_text: str):
        session = page.session(value)
        yield from adding(session, add_text(space, session, own_text, own_title))

    def example(value: str, name: str):
        session = page.session(value)
        yield from adding(session, add_example(space, session, name))

    files.upload(upload, [key, files], adding_outputs, **adds).then(lambda: None, None, [files], **_PRIVATE)
    paste.click(pasted, [key, title, text], adding_outputs, **adds).then(
        lambda: ("", ""), None, [title, text], **_PRIVATE
    )
    for button, name in ((own, OWN), (wikipedia, WIKIPEDIA)):
        button.click(
            lambda value, name=name: (yield from example(value, name)), [key], adding_outputs, **adds
        )
    cancel.click(lambda value: page.session(value).library.cancel(), [key], None, **_PRIVATE)

    def searched(value: str, words: str) -> str:
        library = page.session(value).library
        return rendering.document_table(library.rows(words or ""), bool(words and words.strip()))

    search.change(searched, [key, search], [table], trigger_mode="always_last", **_PRIVATE)

    def on_change(button, change, done: str, inputs: tuple = ()) -> None:
        def run(value: str, words: str, *given):
            session = page.session(value)
            return changed(session, words, lambda: change(session.library, *given), done)

        button.click(run, [key, search, *inputs], [message, *outputs], **_PRIVATE)

    on_change(
        delete, lambda library, names: library.delete(names or []), "Deleted. Undo brings it back.", (chosen,)
    )
    on_change(undo, lambda library: library.undo(), "Undone.")
    on_change(redo, lambda library: library.redo(), "Redone.")
    on_change(sure, lambda library, names: library.forget(names or []), "Erased for good.", (chosen,))
    for button in (sure, keep):
        button.click(lambda: gr.update(visible=False), None, [confirming], **_PRIVATE)

    def ask_first(names: list[str]):
        if not names:
            return rendering.note("Choose a document first.", "bad"), gr.update(visible=False)
        return "", gr.update(visible=True)

    forget.click(ask_first, [chosen], [message, confirming], **_PRIVATE)

    def open_editor(value: str, names: list[str]):
        if len(names or []) != 1:
            return rendering.note("Choose one document to edit.", "bad"), gr.update(visible=False), gr.skip()
        try:
            return "", gr.update(visible=True), page.session(value).library.text(names[0])
        except MSAError as error:
            return rendering.note(str(error), "bad"), gr.update(visible=False), gr.skip()

    def saved(value: str, names: list[str], new: str):
        session = page.session(value)
        if len(names or []) == 1:
            yield from adding(session, update_text(space, session, names[0], new))

    edit.click(open_editor, [key, chosen], [message, editing, edited], **_PRIVATE)
    save.click(saved, [key, chosen, edited], adding_outputs, **adds)
    for button in (save, leave):
        button.click(lambda: gr.update(visible=False), None, [editing], **_PRIVATE)

    page.show(seen, outputs, [search])
