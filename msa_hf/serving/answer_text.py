"""What of a growing text may be shown: nothing that a stop text, or the next token, could still take back."""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """The answer in what a model writes, while it writes: what was shown stays the beginning of the answer.

    Args:
        stops: texts at whose first appearance the answer ends. first_line: whether it ends with its line.
    """

    def __init__(self, stops: Sequence[str] = (), first_line: bool = False):
        self.stops, self.first_line = tuple(stops), first_line
        self.shown = ""
        self.stopped = False

    def advance(self, text: str) -> str:
        """Takes all that was written so far, and gives what can be shown of it and was not yet."""
        answer = self.cut(text)
        if not self.stopped:
            held = max((_overlap(answer, stop) for stop in self.stops), default=0)
            answer = answer[: len(answer) - held].rstrip("\ufffd")  # bytes of an unfinished character
        if self.first_line:
            answer = answer.partition("\n")[0]
        return self._show(answer.rstrip())

    def finish(self, answer: str) -> str:
        """Takes the whole answer, and gives the rest of it; `shown` is then the answer."""
        return self._show(self.cut(answer).strip())

    def cut(self, text: str) -> str:
        """`text` until the first stop text; notes in `stopped` whether there is one."""
        text = text.lstrip()
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        return text

    def _show(self, answer: str) -> str:
        if not answer.startswith(self.shown):
            return ""  # a tokenizer that rewrites what it has decoded
        new, self.shown = answer[len(self.shown) :], answer
        return new


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
