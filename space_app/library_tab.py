"""The Library tab: documents come in, are listed, changed and removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from msa_hf.modeling.errors import MSAError

from . import rendering
from .adding import OWN, WIKIPEDIA, add_example, add_files, add_text, update_text
from .library import Progress
from .sessions import Session

if TYPE_CHECKING:
    from .page import Page

NAME = "Library"
METER_EVERY = 3.0  # seconds; it counts all passages
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
                height=150,
                elem_id="msa-files",
            )
            folder = gr.UploadButton(
                "Add a whole folder", file_count="directory", size="sm", elem_id="msa-folder"
            )
        with gr.Column(scale=2, min_width=300):
            gr.HTML('<p class="msa-hint">Or write one yourself:</p>')
            with gr.Accordion("Paste a text", open=False):
                title = gr.Textbox(
                    label="Title", max_length=100, placeholder="Of the note; the same title replaces it"
                )
                text = gr.Textbox(
                    label="Text", lines=5, max_lines=12, placeholder="Paste or write here", elem_id="msa-text"
                )
                paste = gr.Button("Add this text", variant="primary")
            gr.HTML('<p class="msa-hint">Or begin with an example:</p>')
            with gr.Row():
                own = gr.Button(OWN, size="sm")
                wikipedia = gr.Button(WIKIPEDIA, size="sm")
    with gr.Row(equal_height=True):
        with gr.Column(scale=6, min_width=220):
            progress = gr.HTML(rendering.progress_panel(None))
        cancel = gr.Button("Stop adding", scale=1, min_width=80, interactive=False)
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
        its_name = gr.State("")
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
        """Shows what is added while it is."""
        try:
            begun = rendering.progress_panel(Progress(0, 0, 0, 0, 0.0))
            yield begun, gr.update(interactive=True), "", gr.skip()
            metered = time.monotonic()
            for progressed in portions:
                meter_shown = gr.skip()
                if time.monotonic() - metered > METER_EVERY:
                    meter_shown, metered = rendering.meter_panel(session.library.meter()), time.monotonic()
                yield rendering.progress_panel(progressed), gr.skip(), gr.skip(), meter_shown
            yield gr.skip(), gr.update(interactive=False), "", gr.skip()
        except MSAError as error:
            told = rendering.note(str(error), "bad")
            yield rendering.progress_panel(None), gr.update(interactive=False), told, gr.skip()

    def changed(session: Session, words: str, change, done: str) -> tuple:
        try:
            change()
            text, kind = done, "good"
        except MSAError as error:
            text, kind = str(error), "bad"
        return rendering.note(text, kind), *state(session, words)

    def on_adding(trigger, add: Callable[..., Iterator[Progress]], inputs: Sequence = ()):
        """Shows what `add` does with a session, then the list, as it is searched by then."""

        def run(value: str, *given):
            session = page.session(value)
            yield from adding(session, add(session, *given))

        adds = {"concurrency_id": "adding", "concurrency_limit": 8, **_PRIVATE}
        added = trigger(run, [key, *inputs], [progress, cancel, message, meter], **adds)
        return added.then(
            lambda value, words: seen(page.session(value), words), [key, search], outputs, **_PRIVATE
        )

    def upload(session: Session, paths: list[str] | None, whole: bool = False) -> Iterator[Progress]:
        return add_files(space, session, paths or [], whole)

    # The place to drop files is free again at once.
    dropped = gr.State([])
    arrived = files.upload(lambda paths: (paths, None), [files], [dropped, files], queue=False, **_PRIVATE)
    on_adding(arrived.then, upload, [dropped])
    on_adding(folder.upload, partial(upload, whole=True), [folder])
    on_adding(paste.click, lambda session, *given: add_text(space, session, *given), [text, title]).then(
        lambda refused: [gr.skip()] * 2 if refused else [""] * 2, [message], [text, title], **_PRIVATE
    )
    for button, name in ((own, OWN), (wikipedia, WIKIPEDIA)):
        on_adding(button.click, lambda session, name=name: add_example(space, session, name))
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
        closed = gr.update(visible=False), gr.skip(), gr.skip()
        if len(names or []) != 1:
            return rendering.note("Choose one document to edit.", "bad"), *closed
        try:
            return "", gr.update(visible=True), page.session(value).library.text(names[0]), names[0]
        except MSAError as error:
            return rendering.note(str(error), "bad"), *closed

    edit.click(open_editor, [key, chosen], [message, editing, edited, its_name], **_PRIVATE)
    on_adding(
        save.click, lambda session, *given: update_text(space, session, *given), [its_name, edited]
    ).then(lambda refused: gr.update(visible=bool(refused)), [message], [editing], **_PRIVATE)
    leave.click(lambda: gr.update(visible=False), None, [editing], **_PRIVATE)

    page.show(seen, outputs, [search])
