"""What the Compression tab shows, as HTML: a row per cache, which has its place before there is an answer."""

import re
from difflib import SequenceMatcher

from msa_hf.evaluation.cache_comparison import CacheAnswer

from .comparison import NAMES, Comparison
from .rendering import byte_size, note, safe

_WORD = re.compile(r"\w+|[^\w\s]+|\s+")
_KINDS = {
    "dense": "nothing packed: what the others are measured by",
    "4bit": "every number in 4 bits",
    "3bit": "every number in 3 bits",
    "2.7bit": "mixed widths; calibrated where the model is known",
    "k2v2": "every number in 2 bits",
    "1.8bit": "mixed widths; calibrated where the model is known",
}
_PARTS = (
    ("packed", "packed tokens", ("codes", "scales", "means")),
    ("recent", "recent tokens, as they are", ("window", "exact")),
    ("fixed", "fixed costs and spare room", ("transforms", "reserved", "other")),
)
_ENDS = {"done": "Done", "stopped": "Stopped", "late": "Time is over"}


def progress_line(state: Comparison | None) -> str:
    """How far the comparison is, in words; its line is there from the start."""
    if state is None:
        text = "Six caches answer the same question, one after the other."
    elif state.state == "waiting":
        text = "Waiting: tests of other visitors are running …"
    elif state.state == "running":
        place = len(state.answers)
        if place == len(state.systems):
            text = "Done."
        else:
            text = (
                f"{NAMES[state.systems[place]]} is reading the prompt ({place + 1} of {len(state.systems)}) …"
            )
    else:
        kept = f"{len(state.answers)} of {len(state.systems)} caches have answered."
        text = f"{_ENDS[state.state]}. {kept}"
    return f'<p class="msa-hint msa-line" role="status">{safe(text)}</p>'


def comparison_rows(state: Comparison) -> str:
    """All rows, answered or not, and what is to be known about them."""
    done = {answer.system: answer for answer in state.answers}
    dense = done.get(state.systems[0])
    most = dense.bytes["total"] if dense else 0
    begun = state.state == "running"
    place = len(state.answers)
    rows = "".join(
        _row(name, done.get(name), dense, most, begun and number == place)
        for number, name in enumerate(state.systems)
    )
    return f'<ol class="msa-caches">{rows}</ol>{_about(state, dense)}'


def marked(answer: str, dense: str) -> str:
    """The answer with the words marked that the dense answer does not have in their place."""
    own, other = (_WORD.findall(text) for text in (answer, dense))
    parts = []
    for kind, start, stop, _, _ in SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        text = safe("".join(own[start:stop]))
        changed = kind != "equal" and any(map(str.isalnum, text))
        parts.append(f"<mark>{text}</mark>" if changed else text)
    return "".join(parts)


def _row(name: str, own: CacheAnswer | None, dense: CacheAnswer | None, most: int, current: bool) -> str:
    if own is None or dense is None:
        waits = "Reading …" if current else "–"
        answer, tag = f"<i>{waits}</i>", ""
        figures = [("KL", "–"), ("First word", "–"), ("Bits", "–"), ("Speed", "–")]
        size, bar = "–", ""
    else:
        answer = marked(own.answer, dense.answer) or "<i>(nothing)</i>"
        # What is shown may be the same where tokens after it are not.
        kind, same = ("same", "same answer") if own.answer == dense.answer else ("other", "differs")
        tag = f'<span class="msa-tag msa-{kind}">{same}</span>' * (own is not dense)
        figures = [
            ("KL", "0" if own is dense else _nats(own.kl)),
            ("First word", f"{100 * own.agreement:.1f} %"),
            ("Bits", "–" if own.bits is None else f"{own.bits:.2f}"),
            ("Speed", f"{own.speed:.2f}×"),
        ]
        share = own.bytes["total"] / own.bytes["bfloat16"]
        size = f"<b>{byte_size(own.bytes['total'])}</b> {100 * share:.0f} % of bfloat16"
        bar = _bar(own, most)
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures)
    return (
        f'<li class="msa-cache{" msa-current" * current}"><div class="msa-cache-name"><b>{NAMES[name]}</b>'
        f"<small>{_KINDS[name]}</small></div>"
        f'<div class="msa-cache-answer"><p tabindex="0">{answer}</p>{tag}</div><dl>{cells}</dl>'
        f'<div class="msa-cache-size"><span>{size}</span><div class="msa-stack">{bar}</div></div></li>'
    )


def _bar(own: CacheAnswer, most: int) -> str:
    """Bytes by what they are for, beside the bytes of the dense cache; a line marks bfloat16."""
    if "codes" in own.bytes:
        parts = [(kind, title, sum(own.bytes[part] for part in of)) for kind, title, of in _PARTS]
    else:
        parts = [("recent", "keys and values, as they are", own.bytes["total"])]
    most = max(most, own.bytes["total"], own.bytes["bfloat16"])
    pieces = "".join(
        f'<i class="msa-{kind}" style="width:{100 * size / most:.2f}%" '
        f'title="{title}: {byte_size(size)}"></i>'
        for kind, title, size in parts
        if size
    )
    mark = f'<s style="left:{100 * own.bytes["bfloat16"] / most:.2f}%" title="bfloat16"></s>'
    return f"{pieces}{mark}"


def _about(state: Comparison, dense: CacheAnswer | None) -> str:
    """What the figures mean; where nothing was packed, why they agree."""
    keys = "".join(f'<span><i class="msa-{kind}"></i>{title}</span>' for kind, title, _ in _PARTS)
    keys += "<span><s></s>what bfloat16 would take</span>"
    legend = f'<div class="msa-keys">{keys}</div>'
    packed = [own for own in state.answers[1:] if own.packed_tokens]
    told = ""
    if len(state.answers) > 1 and not packed:
        told = note(
            f"Nothing is packed yet: all {dense.prompt_tokens:,} tokens of this prompt lie in the recent "
            "window, which every cache keeps as it is (the newest 128 to 191 tokens). So the answers and the "
            "figures agree. Add more documents, or let more tokens be read."
        )
    read = ""
    if dense:
        read = f"Prompt of {dense.prompt_tokens:,} tokens"
        read += f", {packed[0].packed_tokens:,} of them read from codes" if packed else ""
        read += f"; compared over {dense.compared} positions. "
    text = (
        "KL says how far the next-token probabilities are from the dense cache's, in nats, 0 being equal. "
        "First word: how often the likeliest token is the same. Speed: the dense cache's time per token over "
        "this one's; on a CPU that others use, times are noisy. Fixed costs, such as a calibration's, "
        "do not grow with what is read."
    )
    return f'{legend}<div class="msa-told">{told}<p class="msa-hint">{safe(read + text)}</p></div>'


def _nats(kl: float) -> str:
    return f"{kl:.4f}" if kl >= 0.0001 else f"{kl:.1e}" if kl > 0 else "0"
