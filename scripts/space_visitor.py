"""Visitors of the app in a headless Chromium, for scripts and tests. It needs playwright and a browser."""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Dialog, Locator, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # to wait for anything that is not told to take longer
TABS = ("Library", "Ask", "Compression", "Needle")
# Keeps what the panel of progress has shown, so that nothing depends on who looks when.
_WATCH = """
window.shown = [];
new MutationObserver(() => {
  for (const own of document.querySelectorAll(".msa-progress")) {
    const text = own.offsetParent ? own.innerText : "";
    if (text && window.shown.at(-1) !== text) window.shown.push(text);
  }
}).observe(document, {subtree: true, childList: true, characterData: true});
"""


def chromium() -> str | None:
    """Path of the browser of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser within the block. Raises RuntimeError if there is none."""
    program = chromium()
    if program is None:
        raise RuntimeError("no Chromium on this machine: install one, on Debian by apt-get install chromium")
    # Chromium's sandbox refuses to run as root, and small containers have little shared memory.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Source:
    """A passage below an answer: title, "document, passage number", text."""

    title: str
    place: str
    text: str

    @property
    def document(self) -> str:
        return self.place.rpartition(", passage ")[0] or self.place


@dataclass(frozen=True)
class Reply:
    """The last turn as the page shows it. seconds: from the key press until it stood there."""

    question: str
    answer: str
    sources: list[Source]
    seconds: float


class Visitor:
    """Somebody with a browser of their own: nothing is shared with other visitors.

    Attributes:
        problems: errors of the console, of scripts, dialogs, and requests to other hosts than the page's.
    """

    def __init__(self, browser: Browser, url: str, width: int = 1280, dark: bool = False):
        scheme = "dark" if dark else "light"
        self.url, self.problems = url, []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("console", lambda own: own.type == "error" and self.problems.append(own.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self._requested(request.url))
        self.page.add_init_script(_WATCH)
        self.page.goto(f"{url}?__theme={scheme}")
        self._opened()

    def close(self) -> None:
        self.page.context.close()

    def reload(self) -> None:
        known = len(self.problems)
        self.page.reload()
        self._opened()
        del self.problems[known:]  # what Gradio says of streams that a reload cuts

    def tab(self, name: str) -> None:
        """Goes to one of TABS."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        """Clicks the button of this name that is in sight."""
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).click()

    # Library

    def upload(self, *paths: str | Path) -> None:
        """Drops files, without waiting for what becomes of them."""
        self.tab("Library")
        self.page.locator("#msa-files input[type=file]").set_input_files(list(map(str, paths)))

    def upload_folder(self, path: str | Path) -> None:
        """Chooses a folder, without waiting for what becomes of it."""
        self.tab("Library")
        self.page.get_by_test_id("Add a whole folder-upload-button").set_input_files(str(path))

    def progress(self) -> str:
        """What the panel of progress says; "" where nothing is added."""
        return self.page.locator(".msa-progress").filter(visible=True).first.inner_text()

    def watched(self) -> list[str]:
        """What the panel has said since the page was opened."""
        return self.page.evaluate("window.shown")

    def added(self, seconds: float = SECONDS) -> None:
        """Waits until what was dropped is in the library, and the page is ready for more."""
        panel = self.page.locator(".msa-progress", has_text="Added.").filter(visible=True)
        panel.wait_for(timeout=1000 * seconds)
        self.page.locator("button:disabled", has_text="Stop adding").filter(visible=True).wait_for()
        self.page.locator("#msa-files input[type=file]").wait_for(state="attached")

    def listed(self, name: str, there: bool = True) -> None:
        """Waits until a document is in the table, or is not there."""
        self.tab("Library")
        rows = self.page.locator(".msa-table tbody td:first-child b")
        row = rows.filter(has_text=re.compile(f"^{re.escape(name)}$"))
        row.wait_for(state="visible" if there else "detached")

    def documents(self) -> list[str]:
        """Names in the table of the Library tab."""
        self.tab("Library")
        return self.page.locator(".msa-table tbody td:first-child b").all_inner_texts()

    def search(self, words: str) -> None:
        self.page.get_by_label("Search the documents").fill(words)

    def choose(self, name: str) -> None:
        """Puts a document among the chosen ones."""
        self.tab("Library")
        field = self.page.get_by_role("combobox", name="Choose documents")
        field.fill(name)
        self.page.get_by_role("option", name=name, exact=True).click()
        self.page.keyboard.press("Escape")

    def note(self) -> Locator:
        """The message that is in sight."""
        return self.page.locator(".msa-note").filter(visible=True)

    # Ask

    def ask(self, question: str, seconds: float = 3 * SECONDS) -> Reply:
        """Types a question, sends it by Enter and waits for the whole answer."""
        self.tab("Ask")
        turns = self.page.locator(".msa-log .msa-turn")
        before, begin = turns.count(), time.monotonic()
        field = self.page.locator("#msa-question textarea, #msa-question input")
        field.fill(question)
        field.press("Enter")
        turns.nth(before).wait_for(timeout=1000 * seconds)
        return self._reply(turns.nth(before), time.monotonic() - begin)

    def forget_conversation(self) -> None:
        """Begins a new one."""
        self.tab("Ask")
        self.press("New conversation")
        self.page.locator(".msa-turn").first.wait_for(state="detached")

    # Trials

    def compare(self, question: str, tokens: int, seconds: float = 5 * SECONDS) -> list[str]:
        """The rows of a comparison of that many tokens of the prompt, the dense cache first."""
        self.tab("Compression")
        field = self.page.get_by_role("spinbutton", name="Tokens of the prompt")
        if not field.is_visible():
            self.page.get_by_role("button", name="How much to read").click()
        field.fill(str(tokens))
        field.press("Tab")
        self.page.locator("#msa-comparison textarea, #msa-comparison input").fill(question)
        self.press("Compare")
        self.page.get_by_text("Done. 6 of 6 caches").wait_for(timeout=1000 * seconds)
        return self.page.locator(".msa-cache").all_inner_texts()

    def needles(self, lengths: Sequence[int], depths: int, seconds: float = 5 * SECONDS) -> list[str]:
        """The lines of a needle test, one per fact."""
        self.tab("Needle")
        boxes = self.page.get_by_role("checkbox").filter(visible=True)
        for number in range(boxes.count()):
            label = boxes.nth(number).locator("xpath=..").inner_text()
            boxes.nth(number).set_checked(int(label.replace(",", "")) in lengths)
        field = self.page.get_by_role("spinbutton", name="Depths")
        field.fill(str(depths))
        field.press("Tab")
        self.press("Hide and ask")
        panel = self.page.locator(".msa-progress b").filter(visible=True)
        panel.filter(has_text="Done").wait_for(timeout=1000 * seconds)
        return self.page.locator(".msa-facts li").all_inner_texts()

    # Looks

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """Shows the top of the page as a window of this size would, in light or dark."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        self.page.evaluate("window.scrollTo(0, 0)")

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def settle(self) -> None:
        """Waits a moment, for a picture without anything that is still on its way."""
        self.page.wait_for_timeout(1500)

    def picture(self) -> bytes:
        """What the window shows, as a PNG."""
        return self.page.screenshot(animations="disabled")

    def _opened(self) -> None:
        self.page.locator(".msa-meter").wait_for()

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _requested(self, url: str) -> None:
        own = urlsplit(url)
        if own.scheme not in ("data", "blob") and own.netloc != urlsplit(self.url).netloc:
            self.problems.append(f"request to {url}")

    def _reply(self, turn: Locator, seconds: float) -> Reply:
        passages = turn.locator(".msa-passage")
        sources = [
            Source(*(passages.nth(number).locator(part).text_content() for part in _PARTS))
            for number in range(passages.count())
        ]
        question, answer = (turn.locator(part).inner_text() for part in (".msa-question", ".msa-answer"))
        return Reply(question, answer, sources, seconds)


_PARTS: Sequence[str] = (".msa-head b", ".msa-head small", "p")
