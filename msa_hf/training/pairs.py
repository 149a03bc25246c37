"""Training pairs: a question, the documents that answer it, and documents that only look as if they did."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RouterPair:
    """One question with the texts of its positive documents (at least one) and of known negatives."""

    question: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


def read_pairs(path: str | Path) -> list[RouterPair]:
    """Pairs from JSON lines {"question": text, "positives": [text, ...], "negatives": [text, ...]}.

    Raises:
        ValueError: no pairs, or a line that is not such an object; the message names the line.
    """
    pairs = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    pairs.append(_pair(json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{path} holds no pairs; one JSON object per line is expected")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[RouterPair]) -> None:
    """What `read_pairs` reads."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)


def hotpotqa_pairs(
    records: list[dict], held_out: int = 1000, limit: int | None = None, distractors_of: int | None = None
) -> list[RouterPair]:
    """Pairs from HotpotQA records after the first `held_out`, which are the standing benchmark.

    No paragraph that is gold for a held-out question is used, and no question that needs such a paragraph.

    Args:
        records: as `msa_hf.packages.hotpotqa()` gives them.
        limit: number of records to look at after the held-out ones; all by default.
        distractors_of: of so many of these the distractors become negatives; the rest give positives only,
            which are quicker to encode. All by default.
    """
    benchmark = {text for record in records[:held_out] for text, gold in paragraphs(record) if gold}
    pairs = []
    for number, record in enumerate(records[held_out : None if limit is None else held_out + limit]):
        marked = paragraphs(record)
        positives = tuple(dict.fromkeys(text for text, gold in marked if gold))
        negatives = dict.fromkeys(text for text, gold in marked if not gold and text not in benchmark)
        if distractors_of is not None and number >= distractors_of:
            negatives = {}
        if positives and not benchmark.intersection(positives):
            pairs.append(RouterPair(record["question"], positives, tuple(negatives)))
    return pairs


def paragraphs(record: dict) -> list[tuple[str, bool]]:
    """(text, is gold) of a HotpotQA record's paragraphs; the text is the title line, then the sentences."""
    gold = {title for title, _ in record["supporting_facts"]}
    return [
        (f"{title}\n{''.join(sentences).strip()}", title in gold) for title, sentences in record["context"]
    ]


def _pair(fields) -> RouterPair:
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object; got {type(fields).__name__}")
    question, positives, negatives = (fields.get(name) for name in ("question", "positives", "negatives"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a non-empty text; got {question!r}")
    for name, texts in (("positives", positives), ("negatives", negatives or [])):
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{name} must be a list of non-empty texts")
    if not positives:
        raise ValueError("positives must hold at least one text")
    return RouterPair(
        question, tuple(positives), tuple(text for text in negatives or [] if text not in positives)
    )
