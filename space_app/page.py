"""The page: a heading and one tab per module of `TABS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from . import api, ask_tab, compression_tab, library_tab, needle_tab
from .refusals import Refused
from .sessions import Session
from .space import Space

TITLE = "Ask your own million tokens"
STORAGE_KEY = "msa-session"
# A tab is a module with NAME and build(page); see ARCHITECTURE.md.
TABS = (library_tab, ask_tab, compression_tab, needle_tab)


@dataclass
class Page:
    """What a tab is built with.

    Attributes:
        space: model, sessions and limits. key: the component that holds the visitor's key, an input of every
            event. shown: (function of a session and of its inputs, its outputs, its inputs), run when the
            page opens and when a tab is chosen.
    """

    space: Space
    key: gr.BrowserState
    shown: list[tuple[Callable[..., Any], list, list]] = field(default_factory=list)

    def session(self, key: object) -> Session:
        """The session of an event. A refusal is shown as a message of the page."""
        try:
            return self.space.sessions.get(key)
        except Refused as error:
            raise gr.Error(f"{error} Reload the page.", print_exception=False) from error

    def show(self, function: Callable[..., Any], outputs: list, inputs: Sequence = ()) -> None:
        """Has outputs filled whenever the tab comes into sight."""
        self.shown.append((function, outputs, list(inputs)))


def build_page(space: Space) -> gr.Blocks:
    """The page and the endpoints of a space."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        key = gr.BrowserState(None, storage_key=STORAGE_KEY, secret=space.secret)
        page = Page(space, key)
        api.add_endpoints(space)  # before the tabs, whose own events must not take their names
        gr.HTML(
            f'<header class="msa-hero"><h1>{TITLE}</h1><p>Documents become a small memory once; every answer '
            "shows the passages that it was read from.</p></header>"
        )
        tabs = []
        with gr.Tabs():
            for module in TABS:
                before = len(page.shown)
                with gr.Tab(module.NAME, id=module.NAME.lower()) as tab:
                    module.build(page)
                tabs.append((tab, page.shown[before:]))
        opened = blocks.load(_ensured(space), [key], [key], api_visibility="private", show_progress="hidden")
        for tab, shown in tabs:
            for function, outputs, inputs in shown:
                options = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
                fill = _for_key(page, function, len(outputs))
                opened.then(fill, [key, *inputs], outputs, **options)
                tab.select(fill, [key, *inputs], outputs, **options)
    blocks.queue(default_concurrency_limit=8, max_size=256)
    return blocks


def _ensured(space: Space):
    def ensured(key: str | None) -> str:
        try:
            return space.sessions.ensure(key).key
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error

    return ensured


def _for_key(page: Page, function: Callable[..., Any], outputs: int):
    def for_key(key: str | None, *given):
        if key is None:  # the first tab is chosen before the page has its session
            return [gr.skip()] * outputs
        return function(page.session(key), *given)

    return for_key
