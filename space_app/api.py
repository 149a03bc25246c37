"""Named endpoints for gradio_client; every one but new_session takes the key of a session first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import gradio as gr

from msa_hf.modeling.errors import MSAError

from .adding import add_files, add_text
from .comparison import compare
from .library import Library, Progress
from .needles import ARTICLES, hide
from .questions import ask
from .space import Space

MOST_LISTED = 1000  # documents of one answer


def add_endpoints(space: Space) -> None:
    """Adds the endpoints to the page that is being built. What is refused is an error with its reason."""

    def session_of(key: str):
        return space.sessions.get(key)

    def new_session() -> str:
        """A new session with an empty library. Keep its key: it is the only way to it."""
        return space.sessions.new().key

    def add_text_to(session: str, text: str, title: str = "") -> dict:
        """Adds a text; one of the same title is replaced."""
        own = session_of(session)
        return _added(own.library, add_text(space, own, text, title))

    def ask_session(session: str, question: str, way: str = "", k: int = 0, rounds: int = 0) -> dict:
        """Answers a question, with the passages that were read, their ranks and their scores."""
        *_, last = ask(space.engine, space.limits, session_of(session), question, way, k, rounds)
        return last.to_dict()

    def delete(session: str, names: list[str]) -> dict:
        """Removes documents; undo brings them back."""
        own = session_of(session)
        own.library.delete(names)
        return _state(own.library)

    def undo(session: str) -> dict:
        """Takes back the last change."""
        own = session_of(session)
        own.library.undo()
        return _state(own.library)

    def redo(session: str) -> dict:
        """Takes back the last undo."""
        own = session_of(session)
        own.library.redo()
        return _state(own.library)

    def forget(session: str, names: list[str]) -> dict:
        """Erases documents for good."""
        own = session_of(session)
        own.library.forget(names)
        return _state(own.library)

    def cancel(session: str) -> bool:
        """Ends what adds documents; what is done stays."""
        session_of(session).library.cancel()
        return True

    def documents(session: str, search: str = "") -> list[dict]:
        """Names, titles, passages and tokens of the documents."""
        return [row.to_dict() for row in session_of(session).library.rows(search)[:MOST_LISTED]]

    def meter(session: str) -> dict:
        """What the library holds and takes."""
        return session_of(session).library.meter().to_dict()

    def history(session: str) -> list[dict]:
        """The conversation so far."""
        return [turn.to_dict() for turn in session_of(session).history.turns]

    def compare_session(session: str, question: str, tokens: int = 0) -> dict:
        """The question with every cache side by side; streams what is known after each of them."""
        for state in compare(space, session_of(session), question, tokens):
            yield state.to_dict()

    def needle(
        session: str, lengths: list[int], depths: int = 5, seed: int = 0, texts: str = ARTICLES
    ) -> dict:
        """Hides facts in texts of these lengths and asks for them; streams what is known after each step."""
        for state in hide(space, session_of(session), lengths, depths, seed, texts):
            yield state.to_dict()

    def stop(session: str) -> bool:
        """Ends the answer, the comparison or the needle test that is running; what is done stays."""
        own = session_of(session)
        own.end_answer()
        own.end_trial()
        return True

    def upload(session: str, paths: list[str] | None) -> dict:
        own = session_of(session)
        return _added(own.library, add_files(space, own, paths or []))

    quick = {"concurrency_limit": 8}
    for function in (new_session, delete, undo, redo, forget, cancel, stop, documents, meter, history):
        gr.api(_told(function), api_name=function.__name__, **quick)
    gr.api(_told(add_text_to), api_name="add_text", concurrency_id="adding", concurrency_limit=8)
    gr.api(_told(ask_session), api_name="ask", concurrency_id="asking", concurrency_limit=32)
    trying = {"concurrency_id": "trying", "concurrency_limit": 8}
    gr.api(_told_steps(compare_session), api_name="compare", **trying)
    gr.api(_told_steps(needle), api_name="needle", **trying)
    # Only a File component takes nothing but what the client has uploaded.
    key = gr.Textbox(visible=False, label="session")
    files = gr.File(visible=False, label="files", file_count="multiple")
    added = gr.JSON(visible=False)
    gr.Button(visible=False).click(
        _told(upload),
        [key, files],
        [added],
        api_name="upload",
        api_description="Adds uploaded files.",
        concurrency_id="adding",
        concurrency_limit=8,
    )


def _told(function):
    """The function, with its refusals as errors that a client can read."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MSAError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


def _told_steps(function):
    """The same for a function that streams."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from function(*args, **kwargs)
        except MSAError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


def _added(library: Library, portions: Iterator[Progress]) -> dict:
    *_, last = portions
    return {
        **_state(library),
        "added_documents": last.documents,
        "added_tokens": last.tokens,
        "cancelled": last.cancelled,
    }


def _state(library: Library) -> dict:
    return {"documents": [row.name for row in library.rows()][:MOST_LISTED], "undoable": library.undoable}
