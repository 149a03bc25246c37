"""How a calibration works, and the segments of text that it works on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer


@dataclass(frozen=True)
class CalibrationPlan:
    """How a calibration works; the defaults take minutes on one core for a model of 0.1 billion weights.

    Args:
        context, continuation: tokens of a segment of text that are coded, and that read them.
        segments: of all texts together, at most; one of each text comes first.
        directions: gradients taken of a segment. stride: every how-many-th token is kept.
        key_floor, value_floor: bits per coordinate that every head gets at least: what a head is worth to the
            texts at hand does not tell what it is worth to others.
        key_shrinkage, value_shrinkage: see `fit_transform`.
        measured: segments on which KL is measured. probe_tokens: how many tokens of them each layer alone is
            measured on.
        rounds: how often measured KL corrects the prices, unless that makes it worse.
        seed: of everything random.
    """

    context: int = 1024
    continuation: int = 512
    segments: int = 12
    directions: int = 2
    stride: int = 2
    key_floor: float = 0.5
    value_floor: float = 0.75
    key_shrinkage: float = 0.1
    value_shrinkage: float = 0.5
    measured: int = 2
    probe_tokens: int = 128
    rounds: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in (
            "context",
            "continuation",
            "segments",
            "directions",
            "stride",
            "measured",
            "probe_tokens",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0; got {self.rounds}")


def cut_segments(rows: list[list[int]], plan: CalibrationPlan) -> tuple[list[list[int]], list[int]]:
    """(segments, the text that each is from): one of every text, then the second ones, up to the plan's
    number.

    Raises ValueError if there are fewer than two.
    """
    length = plan.context + plan.continuation
    cut = [[row[i : i + length] for i in range(0, len(row) - length + 1, length)] for row in rows]
    depth = max(map(len, cut), default=0)
    order = [(place, text) for place in range(depth) for text in range(len(cut)) if place < len(cut[text])]
    order = order[: plan.segments]
    if len(order) < 2:
        raise ValueError(
            f"texts must hold at least two segments of {length} tokens (context + continuation); got "
            f"{len(order)} from {len(rows)} texts of {[len(row) for row in rows]} tokens"
        )
    return [cut[text][place] for place, text in order], [text for _, text in order]


def spaced(numbers: list[int], count: int) -> list[int]:
    """At most `count` of some numbers, the first and the last among them."""
    last = max(1, min(count, len(numbers)) - 1)
    return sorted({numbers[i * (len(numbers) - 1) // last] for i in range(last + 1)})[:count]


def halves(owners: list[int]) -> tuple[list[int], list[int]]:
    """Two halves of the segments; no text is in both, if there is more than one."""
    texts = sorted(set(owners))
    half = {text: number % 2 for number, text in enumerate(texts)}
    side = [half[text] for text in owners] if len(texts) > 1 else [i % 2 for i in range(len(owners))]
    return [i for i, own in enumerate(side) if own == 0], [i for i, own in enumerate(side) if own == 1]


def token_rows(model: Any, texts: Sequence[str | Sequence[int]], tokenizer: Any) -> list[list[int]]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts or of token ids; got one text")
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the model has no tokenizer at {model.name_or_path!r} ({error}): give one, or token ids"
            ) from error
    return [
        tokenizer(text)["input_ids"] if isinstance(text, str) else [int(token) for token in text]
        for text in texts
    ]
