"""The standing benchmark: the first 1,000 HotpotQA dev questions over all their paragraphs (9,769 documents).

HotpotQA (Yang et al., EMNLP 2018; CC BY-SA 4.0) comes as a data file inside a PyPI package, never committed.
The distractor setting gives every question ten paragraphs, two of them gold; the memory is their union, so
gold has to be found among everybody's paragraphs: the HotpotQA memory of arXiv 2603.23516.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

BENCHMARK_QUESTIONS = 1000


@dataclass(frozen=True)
class HotpotQA:
    """Questions with answers, indices of their gold documents, and the documents of all of them."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    gold: tuple[tuple[int, ...], ...]  # document indices in the order of the question's paragraphs
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def first(self, questions: int | None) -> HotpotQA:
        """The first `questions` questions over the SAME documents (None: all)."""
        cut = slice(questions)
        return replace(self, questions=self.questions[cut], answers=self.answers[cut], gold=self.gold[cut])

    def digest(self) -> str:
        """Hex digest of the documents in their order: what a cached memory or embedding is made from."""
        return document_digest(self.documents)


def load_hotpotqa(
    questions: int = BENCHMARK_QUESTIONS, first: int = 0, records: Sequence[dict] | None = None
) -> HotpotQA:
    """Questions `first` to `first + questions` of HotpotQA dev and all their unique paragraphs.

    The default is the standing benchmark; fewer `questions` give a smaller memory too (ten documents each).
    Raises DataUnavailableError if the package cannot be had, ValueError for bad limits.
    """
    if questions < 1 or first < 0:
        raise ValueError(f"questions must be >= 1 and first >= 0, got {questions} and {first}")
    if records is None:
        from msa_hf.packages import hotpotqa

        records = hotpotqa()
    return from_records(records[first : first + questions])


def from_records(records: Sequence[dict]) -> HotpotQA:
    """Raw HotpotQA records (question, answer, context, supporting_facts) as a benchmark."""
    documents: dict[str, int] = {}
    gold = []
    for record in records:
        titles = {title for title, _ in record["supporting_facts"]}
        numbers = [
            (title, documents.setdefault(paragraph(title, sentences), len(documents)))
            for title, sentences in record["context"]
        ]
        gold.append(tuple(number for title, number in numbers if title in titles))
    return HotpotQA(
        questions=tuple(record["question"] for record in records),
        answers=tuple(record["answer"] for record in records),
        gold=tuple(gold),
        documents=tuple(documents),
    )


def paragraph(title: str, sentences: Sequence[str]) -> str:
    """A paragraph as a document: its title on a line of its own, then its sentences."""
    return f"{title}\n{''.join(sentences).strip()}"


def document_digest(documents: Sequence[str]) -> str:
    """SHA-256 over the documents with their lengths (their boundaries count)."""
    return hashlib.sha256(json.dumps(list(documents), ensure_ascii=False).encode()).hexdigest()
