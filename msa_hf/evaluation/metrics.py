"""Metrics of retrieval and of short answers, with bootstrap intervals.

Retrieval metrics take `rankings` (a list of document ids per question, best first) and `gold` (a collection
of document ids per question) and give one float64 per question, so that two methods can be compared in pairs.
Answer metrics follow the official HotpotQA and SQuAD evaluation: lower case, no punctuation, no articles,
single spaces; HotpotQA scores F1 zero when exactly one side says yes or no, or both differ.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

Rankings = Sequence[Sequence[int]]
Gold = Sequence[Collection[int]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def recall_at(rankings: Rankings, gold: Gold, k: int) -> np.ndarray:
    """Per question, the fraction of its gold documents among the first k [Q]."""
    return np.array([len(set(ids[:k]) & set(good)) / len(set(good)) for ids, good in _pairs(rankings, gold)])


def all_gold_at(rankings: Rankings, gold: Gold, k: int) -> np.ndarray:
    """Per question, 1.0 if every gold document is among the first k [Q]; HotpotQA's "both gold"."""
    return np.array([float(set(good) <= set(ids[:k])) for ids, good in _pairs(rankings, gold)])


def reciprocal_rank(rankings: Rankings, gold: Gold) -> np.ndarray:
    """Per question, 1 / rank of its first gold document, 0.0 where none is ranked [Q]; the mean is MRR."""
    values = []
    for ids, good in _pairs(rankings, gold):
        wanted = set(good)
        values.append(next((1.0 / rank for rank, i in enumerate(ids, 1) if i in wanted), 0.0))
    return np.array(values)


def _pairs(rankings: Rankings, gold: Gold):
    if len(rankings) != len(gold):
        raise ValueError(
            f"rankings and gold need one entry per question, got {len(rankings)} and {len(gold)}"
        )
    for number, good in enumerate(gold):
        if not good:
            raise ValueError(f"every question needs at least one gold document, question {number} has none")
    return zip(rankings, gold, strict=True)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (the order of the official scripts)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both normalise to the same string."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """SQuAD's F1 over normalised tokens; two empty strings agree."""
    left, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2.0 * shared / (len(left) + len(right))


def hotpot_f1(prediction: str, answer: str) -> float:
    """HotpotQA's F1: `token_f1`, but zero unless both sides say the same of yes, no and noanswer."""
    left, right = normalize_answer(prediction), normalize_answer(answer)
    if left != right and (left in _CLOSED_ANSWERS or right in _CLOSED_ANSWERS):
        return 0.0
    return token_f1(prediction, answer)


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0) -> Estimate:
    """Percentile bootstrap of the mean over questions.

    Equal seeds draw equal questions, so estimates of several methods over the same questions move together.
    """
    means = _resampled(np.asarray(values, dtype=np.float64)[None], samples, seed)[0]
    return _estimate(float(np.mean(values)), means, level)


def paired_difference(
    left: Sequence[float], right: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of left - right over the same questions, with an interval from resampled questions."""
    left, right = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired values must have equal shapes, got {left.shape} and {right.shape}")
    return bootstrap(left - right, level, samples, seed)


def gap_closed(
    low: Sequence[float],
    value: Sequence[float],
    high: Sequence[float],
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """How much of the way from `low` to `high` the means of `value` go, with a paired bootstrap interval.

    NaN where `high` is not above `low`. Resamples without a positive gap are left out of the interval.
    """
    rows = np.asarray([low, value, high], dtype=np.float64)
    bottom, middle, top = _resampled(rows, samples, seed)
    kept = top > bottom
    ratios = (middle[kept] - bottom[kept]) / (top[kept] - bottom[kept])
    means = rows.mean(axis=1)
    gap = means[2] - means[0]
    return _estimate(float((means[1] - means[0]) / gap) if gap > 0 else float("nan"), ratios, level)


def _resampled(rows: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means of rows [M, Q] over questions drawn with replacement: [M, samples]."""
    if rows.shape[1] == 0:
        raise ValueError("no questions to average over")
    draws = np.random.default_rng(seed).integers(0, rows.shape[1], size=(samples, rows.shape[1]))
    return np.stack([row[draws].mean(axis=1) for row in rows])


def _estimate(mean: float, means: np.ndarray, level: float) -> Estimate:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if means.size == 0:
        return Estimate(mean, float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(mean, float(low), float(high))
