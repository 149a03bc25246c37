"""What the page shows of documents, questions and answers, as HTML in which nothing untrusted is HTML.

Every text of a stranger passes through `safe`, which leaves no character that could begin a tag, an entity,
an attribute or a template.
"""

import re
from collections.abc import Sequence
from html import escape

from .history import Passage, Turn
from .library import Progress, Row
from .meter import Meter
from .questions import telling_words

SHOWN_ROWS = 200
_PART = re.compile(r"\w+|\W+")


def safe(text: object) -> str:
    """Text that a browser shows as it is."""
    # Gradio's own templates read ${...}, {{...}} and backquotes.
    return "".join(_ENTITIES.get(c, c) for c in escape(str(text)))


_ENTITIES = {c: f"&#{ord(c)};" for c in "${}`"}


def highlighted(text: str, words: set[str]) -> str:
    """The text with `words` marked."""
    parts = (
        f"<mark>{safe(part)}</mark>" if part.casefold() in words else safe(part)
        for part in _PART.findall(text)
    )
    return "".join(parts)


def byte_size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def note(text: str, kind: str = "info") -> str:
    """A message; kind: info, good or bad."""
    role = "alert" if kind == "bad" else "status"
    return f'<div class="msa-note msa-{kind}" role="{role}">{safe(text)}</div>'


def meter_panel(meter: Meter) -> str:
    share = min(1.0, meter.tokens / meter.most_tokens)
    saved = meter.cache_bytes / meter.vector_bytes if meter.vector_bytes else 0
    figures = [
        ("Tokens", f"{meter.tokens:,}", f"of {meter.most_tokens:,}"),
        ("Documents", f"{meter.documents:,}", f"{meter.passages:,} passages"),
        ("Memory", byte_size(meter.vector_bytes), f"{meter.bytes_per_token:,.0f} bytes per token"),
        (
            "Plain KV cache",
            byte_size(meter.cache_bytes),
            f"{saved:,.0f} times as much" if saved else "in bfloat16",
        ),
    ]
    cells = "".join(
        f'<div class="msa-figure"><span>{name}</span><b>{value}</b><small>{more}</small></div>'
        for name, value, more in figures
    )
    bar = f'<div class="msa-bar"><i style="width:{100 * share:.2f}%"></i></div>'
    return f'<section class="msa-meter" aria-label="Memory meter">{cells}{bar}</section>'


def progress_panel(progress: Progress | None) -> str:
    if progress is None:
        return progress_bar(
            "Ready", 0.0, "What you add is cut into passages, and each is read into memory once."
        )
    if not progress.all_tokens:
        cut = f"{progress.cut:,} of {progress.all_documents:,} documents"
        return progress_bar("Cutting into passages", 0.0, cut if progress.all_documents else "Starting")
    share = progress.tokens / progress.all_tokens
    if progress.ended:
        head = "Stopped. What was done is kept." if progress.cancelled else "Added."
    else:
        head = "Reading into memory"
    parts = [
        f"{progress.documents:,} of {progress.all_documents:,} documents",
        f"{progress.tokens:,} of {progress.all_tokens:,} tokens",
    ]
    if progress.tokens:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left and not progress.ended:
        parts.append(f"{duration(progress.seconds_left)} left")
    return progress_bar(head, share, " · ".join(parts))


def progress_bar(head: str, share: float, text: str) -> str:
    """A panel that says what is done, how much of it, and more in small letters."""
    bar = f'<div class="msa-bar"><i style="width:{100 * share:.2f}%"></i></div>'
    return f'<div class="msa-progress" role="status"><b>{head}</b>{bar}<small>{safe(text)}</small></div>'


def document_table(rows: Sequence[Row], searched: bool) -> str:
    if not rows:
        text = (
            "No document matches these words."
            if searched
            else "Nothing here yet. Drop a book above, paste a text, or take an example."
        )
        return f'<div class="msa-empty">{text}</div>'
    lines = "".join(
        f"<tr><td><b>{safe(row.name)}</b><small>{safe(row.title * (row.title != row.name))}</small></td>"
        f"<td>{row.passages:,}</td><td>{row.tokens:,}</td></tr>"
        for row in rows[:SHOWN_ROWS]
    )
    more = len(rows) - SHOWN_ROWS
    rest = f'<div class="msa-more">and {more:,} more: search to see them</div>' if more > 0 else ""
    return (
        '<div class="msa-scroll" tabindex="0" role="region" aria-label="Documents"><table class="msa-table">'
        '<thead><tr><th scope="col">Document</th><th scope="col">Passages</th>'
        '<th scope="col">Tokens</th></tr>'
        f"</thead><tbody>{lines}</tbody></table>{rest}</div>"
    )


def conversation(turns: Sequence[Turn], empty_library: bool = False, opened: bool = True) -> str:
    """The turns with their sources, those of the last one open; without any, what to do first."""
    if not turns:
        head, text = (
            (
                "Your library is empty",
                "Add a book, notes or an example in the Library tab; then ask about it here.",
            )
            if empty_library
            else ("Ask about your documents", "The answer comes with the passages that the model has read.")
        )
        return f'<div class="msa-welcome"><b>{head}</b><p>{text}</p></div>'
    last = len(turns) - 1
    return "".join(turn_block(turn, opened and number == last) for number, turn in enumerate(turns))


def turn_block(turn: Turn, opened: bool = True) -> str:
    waits = {"waiting": "Looking through your library …", "reading": "Reading …"}
    answer = safe(turn.answer) if turn.answer else f"<i>{waits.get(turn.state, 'No answer.')}</i>"
    notes = ""
    if turn.state == "stopped":
        notes += '<span class="msa-tag">stopped</span>'
    if turn.state == "done" and not turn.found:
        notes += note(
            "Nothing relevant was found: no passage shares a word with your question. The answer is the "
            "model's own guess, so do not rely on it."
        )
    return (
        f'<article class="msa-turn"><div class="msa-question">{safe(turn.question)}</div>'
        f'<div class="msa-answer msa-{turn.state}">{answer}</div>{notes}'
        f"{sources_block(turn, opened)}</article>"
    )


def sources_block(turn: Turn, opened: bool = True) -> str:
    if not turn.passages:
        return ""
    words = telling_words(turn.question)
    rounds = sorted({own.round for own in turn.passages})
    parts = []
    for number in rounds:
        found = [own for own in turn.passages if own.round == number]
        title = f"<h4>Round {number}</h4>" if len(rounds) > 1 else ""
        parts.append(title + "".join(passage_block(own, words) for own in found))
    count = len(turn.passages)
    summary = f"{count} passage{'s' * (count != 1)} read · {turn.seconds:.1f} s"
    return (
        f'<details class="msa-sources"{" open" * opened}><summary>{summary}</summary>{"".join(parts)}'
        f"{heat_map(turn.passages)}</details>"
    )


def passage_block(passage: Passage, words: set[str]) -> str:
    title, _, body = passage.text.partition("\n")
    body = body or title
    figures = [f"router rank {passage.router_rank:,}", f"router score {passage.router_score:.2f}"]
    if passage.lexical is not None:
        figures.append(f"BM25 {passage.lexical:.2f}")
    chips = "".join(f"<span>{text}</span>" for text in figures)
    return (
        f'<div class="msa-passage"><div class="msa-head"><b>{safe(passage.title or title)}</b>'
        f"<small>{safe(_place(passage))}</small></div><p>{highlighted(body, words)}</p>"
        f'<div class="msa-chips">{chips}</div></div>'
    )


def heat_map(passages: Sequence[Passage]) -> str:
    """Router layers x passages: within each layer, the darkest cell is its best passage."""
    layers = list(dict.fromkeys(layer for own in passages for layer in own.per_layer))
    if not layers:
        return ""
    head = "".join(f'<th scope="col">{safe(_short(own))}</th>' for own in passages)
    lines = ""
    for layer in layers:
        scores = [own.per_layer.get(layer, float("nan")) for own in passages]
        known = [score for score in scores if score == score]
        low, high = min(known), max(known)
        cells = "".join(_cell(score, low, high) for score in scores)
        lines += f'<tr><th scope="row">Layer {safe(layer)}</th>{cells}</tr>'
    return (
        '<div class="msa-scroll" tabindex="0" role="region" aria-label="Router scores by layer">'
        '<table class="msa-heat"><caption>Router scores by layer</caption>'
        f"<thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _place(passage: Passage) -> str:
    return f"{passage.document}, passage {passage.piece}" if passage.piece else passage.document


def _short(passage: Passage) -> str:
    title = passage.title if len(passage.title) <= 28 else f"{passage.title[:27]}…"
    return f"{title} ({passage.piece})" if passage.piece else title


def _cell(score: float, low: float, high: float) -> str:
    if score != score:
        return "<td>–</td>"
    share = (score - low) / (high - low) if high > low else 1.0
    return f'<td style="--heat:{share:.3f}">{score:.3f}</td>'


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
