"""MMLU, 5-shot, with the examples kept in the cache: what a quantised memory of a prompt costs in accuracy.

The five examples of a subject go through a fresh cache once. Every question goes on from a copy of it and is
answered by the largest logit among " A", " B", " C" and " D". Questions are taken in the order of every
subject's test split, from the first or a later one on (Hendrycks et al., arXiv 2009.03300; prompt as in its
release).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msa_hf.evaluation.arrow_stream import read_columns
from msa_hf.evaluation.cache_systems import CacheSystem, using_attention
from msa_hf.evaluation.metrics import Estimate, bootstrap, gap_closed, paired_difference
from msa_hf.packages import mmlu

_LETTERS = "ABCD"


@dataclass(frozen=True)
class Subject:
    """Token ids of a subject's examples, and of its questions with the right choices (0 to 3)."""

    name: str
    prefix: list[int]
    questions: list[list[int]]
    answers: list[int]


@dataclass(frozen=True)
class MmluScore:
    """Accuracy of one system; `retained` is its ratio to the dense cache's, paired over questions."""

    name: str
    accuracy: Estimate
    retained: Estimate | None
    difference: Estimate | None
    same_answer: float | None  # fraction of questions answered like the dense cache
    storage: dict[str, float]  # means over subjects, see `describe_storage`
    answers: list[int]


def load_subjects(
    tokenizer: Any, per_subject: int = 6, subjects: int | None = None, skip: int = 0, cache: Any = None
) -> list[Subject]:
    """Subjects by name, or `subjects` of them spread evenly over the names.

    Each has `per_subject` questions, or as many as there are after the first `skip`.
    """
    asked = slice(skip, skip + per_subject)
    examples, tests = mmlu("dev", cache), mmlu("test", cache)
    names = list(tests)
    if subjects is not None:
        names = [names[number * len(names) // subjects] for number in range(subjects)]
    return [_subject(tokenizer, name, examples[name], tests[name], asked) for name in names]


def measure_mmlu(
    model: Any, tokenizer: Any, system: CacheSystem, subjects: Sequence[Subject]
) -> tuple[list[int], list[dict[str, float]]]:
    """The choice for every question, and per subject how its examples were held."""
    letters = torch.tensor([letter_token(tokenizer, letter) for letter in _LETTERS], device=model.device)
    choices, storage = [], []
    with using_attention(model, system.attention), torch.inference_mode():
        for subject in subjects:
            cache = system.make(model.config)
            prefix = torch.tensor([subject.prefix], device=model.device)
            model(prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
            storage.append(describe_storage(cache, len(subject.prefix)))
            for question in subject.questions:
                ids = torch.tensor([question], device=model.device)
                out = model(ids, past_key_values=copy.deepcopy(cache), use_cache=True, logits_to_keep=1)
                choices.append(int(out.logits[0, -1, letters].argmax()))
    return choices, storage


def summarize_mmlu(
    name: str,
    choices: Sequence[int],
    subjects: Sequence[Subject],
    storage: Sequence[dict[str, float]],
    dense: Sequence[int] | None = None,
) -> MmluScore:
    """Scores of one system; `dense` are the choices of DynamicCache for the same questions."""
    wanted = [answer for subject in subjects for answer in subject.answers]
    right = [float(a == b) for a, b in zip(choices, wanted, strict=True)]
    retained = difference = same = None
    if dense is not None:
        base = [float(a == b) for a, b in zip(dense, wanted, strict=True)]
        retained = gap_closed([0.0] * len(base), right, base)
        difference = paired_difference(right, base)
        same = sum(a == b for a, b in zip(choices, dense)) / len(choices)
    means = {key: sum(row[key] for row in storage) / len(storage) for key in storage[0]} if storage else {}
    return MmluScore(name, bootstrap(right), retained, difference, same, means, list(choices))


def describe_storage(cache: Any, tokens: int) -> dict[str, float]:
    """How the examples are held, as the cache itself reports; without a report only their number."""
    described = {"prefix_tokens": float(tokens)}
    if hasattr(cache, "report"):
        described |= {key: float(value) for key, value in cache.report().to_dict().items()}
    return described


def letter_token(tokenizer: Any, letter: str) -> int:
    """The one token of a choice after "Answer:". Raises ValueError where the tokenizer has no such token."""
    ids = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the tokenizer writes ' {letter}' as {len(ids)} tokens, MMLU needs one")
    return ids[0]


def _subject(tokenizer: Any, name: str, examples: bytes, tests: bytes, asked: slice) -> Subject:
    shots, posed = read_columns(examples), read_columns(tests)
    title = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
    solved = [
        f"{_block(question, choices)} {_LETTERS[answer]}\n\n"
        for question, choices, answer in zip(shots["question"], shots["choices"], shots["answer"])
    ]
    questions = [
        _block(question, choices)
        for question, choices in zip(posed["question"][asked], posed["choices"][asked])
    ]
    return Subject(
        name,
        tokenizer(title + "".join(solved))["input_ids"],
        [tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions],
        posed["answer"][asked],
    )


def _block(question: str, choices: Sequence[str]) -> str:
    lines = [
        question.strip(),
        *(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices)),
        "Answer:",
    ]
    return "\n".join(lines)
