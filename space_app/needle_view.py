"""What the Needle tab shows, as HTML: a map of depths and lengths, whose cells have their place at once."""

from msa_hf.evaluation.memory_needle import NeedleCell, summarize
from msa_hf.evaluation.needle_map import level

from .needles import Needles
from .rendering import duration, progress_bar, safe

# By level: class, sign, words. The signs tell them apart without colours.
KINDS = (
    ("lost", "✕", "lost: its passage was not read"),
    ("untold", "◐", "its passage was read, the answer does not tell it"),
    ("found", "✓", "found"),
)
NOT_YET = ("open", "·", "not asked yet")
# Links would leave the page, whose base is another address.
CHOOSE = """element.addEventListener('click', event => {
  const cell = event.target.closest('[data-line]');
  const line = cell && document.getElementById(cell.dataset.line);
  if (!line) return;
  document.querySelectorAll('.msa-facts .msa-chosen').forEach(other => other.classList.remove('msa-chosen'));
  line.classList.add('msa-chosen');
  line.scrollIntoView({block: 'nearest'});
});"""
_ENDS = {
    "done": "Done",
    "stopped": "Stopped; what was asked stays",
    "late": "Time is over; what was asked stays",
}


def ready_panel(text: str) -> str:
    """What is to be expected, where the progress will be."""
    return progress_bar("Ready", 0.0, text)


def progress_panel(state: Needles) -> str:
    """How far the test is, in words and as a bar."""
    read = state.tokens / state.total if state.total else 0.0
    asked = len(state.cells) / state.all_cells
    if state.state == "waiting":
        head = "Waiting: tests of other visitors are running"
    elif state.state == "running":
        head = _doing(state)
    else:
        head = _ENDS[state.state]
    parts = [f"{len(state.cells)} of {state.all_cells} facts asked"]
    if state.total:
        parts.insert(0, f"{state.tokens:,} of {state.total:,} tokens read")
    parts.append(duration(state.seconds))
    if state.seconds_left:
        parts.append(f"about {duration(state.seconds_left)} left")
    return progress_bar(head, (read + asked) / 2, " · ".join(parts))


def needle_map(state: Needles) -> str:
    """Depth down, length across; each cell says what it is, and leads to its line below."""
    known = {(cell.length, cell.depth): cell for cell in state.cells}
    head = "".join(f'<th scope="col">{_short(length)}</th>' for length in state.lengths)
    lines = ""
    for row, depth in enumerate(state.depths):
        cells = "".join(
            _cell(known.get((length, depth)), length, depth, f"needle-{column}-{row}")
            for column, length in enumerate(state.lengths)
        )
        lines += f'<tr><th scope="row">{depth:.0%}</th>{cells}</tr>'
    keys = "".join(
        f'<span><i class="msa-needle msa-{kind}">{sign}</i>{words}</span>'
        for kind, sign, words in (*KINDS[::-1], NOT_YET)
    )
    return (
        f'<div class="msa-map"><table><caption>{_summary(state)}</caption><thead><tr>'
        f'<th scope="col">Depth</th>{head}</tr></thead><tbody>{lines}</tbody></table>'
        '<p class="msa-hint">Tokens of the memory across; down, where in it the fact is hidden.</p>'
        f'<div class="msa-keys">{keys}</div></div>'
    )


def needle_table(state: Needles) -> str:
    """A line per fact: what was asked, what was to be said, and what was said."""
    if not state.cells:
        text = "Each fact appears here with its question, what was expected and what the model said."
        return f'<div class="msa-empty msa-needle-lines">{text}</div>'
    lines = "".join(_line(state, cell) for cell in reversed(state.cells))
    return (
        '<div class="msa-scroll msa-needle-lines" tabindex="0" role="region" aria-label="Facts and answers">'
        f'<ul class="msa-facts">{lines}</ul></div>'
    )


def _cell(cell: NeedleCell | None, length: int, depth: float, place: str) -> str:
    kind, sign, words = NOT_YET if cell is None else KINDS[level(cell)]
    said = f"{length:,} tokens, depth {depth:.0%}: {words}"
    if cell is None:
        return f'<td><span class="msa-needle msa-{kind}" title="{said}">{sign}</span></td>'
    said += f". Expected {safe(cell.expected)}, got {safe(cell.answer)}"
    named = f'class="msa-needle msa-{kind}" data-line="{place}" title="{said}" aria-label="{said}"'
    return f'<td><button type="button" {named}>{sign}</button></td>'


def _line(state: Needles, cell: NeedleCell) -> str:
    kind, sign, words = KINDS[level(cell)]
    place = f"needle-{state.lengths.index(cell.length)}-{state.depths.index(cell.depth)}"
    rank = f"read as number {cell.rank}" if cell.rank else "not read"
    return (
        f'<li id="{place}"><i class="msa-needle msa-{kind}" title="{words}">{sign}</i><div>'
        f"<b>{safe(cell.question)}</b><span>expected <q>{safe(cell.expected)}</q></span>"
        f"<span>said <q>{safe(cell.answer)}</q></span>"
        f"<small>{cell.tokens:,} tokens in {cell.documents:,} passages, depth {cell.depth:.0%} · router rank "
        f"{cell.router_rank:,} of {cell.documents:,}, {rank} · {cell.seconds:.1f} s</small></div></li>"
    )


def _summary(state: Needles) -> str:
    if not state.cells:
        return "Nothing asked yet"
    whole = summarize(state.cells)
    found = sum(cell.found for cell in state.cells)
    return (
        f"{found} of {whole.asked} facts found: {100 * whole.found.mean:.0f} % (95 % interval "
        f"{100 * whole.found.low:.0f} to {100 * whole.found.high:.0f} %)"
    )


def _doing(state: Needles) -> str:
    if not state.total:
        return "Cutting the texts into passages"
    asked = len(state.cells)
    length = state.lengths[min(asked // len(state.depths), len(state.lengths) - 1)]
    if asked == 0 or asked % len(state.depths) == 0:
        return f"Reading into memory, for {length:,} tokens"
    return f"Asking at {length:,} tokens, depth {state.depths[asked % len(state.depths)]:.0%}"


def _short(length: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if length >= size:
            return f"{length / size:g}{unit}"
    return str(length)
