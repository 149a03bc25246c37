"""Answer quality: closed book, from memory, and with the gold paragraphs given, in one run.

All settings share the prompt template and the decoding; only the documents in the prompt differ (closed
book leaves those of worked examples out, too). Reported are
exact match and F1 of HotpotQA, and how much of the way from closed book to gold the memory goes, as the model
ranks documents by default and by its routers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msa_hf.evaluation import metrics
from msa_hf.evaluation.cached_memory import benchmark_memory
from msa_hf.evaluation.environment import Environment, describe_environment
from msa_hf.evaluation.hotpotqa import HotpotQA
from msa_hf.evaluation.metrics import Estimate

CLOSED_BOOK, MEMORY, ROUTERS, GOLD = "closed book", "memory", "routers alone", "gold given"


@dataclass(frozen=True)
class Answer:
    """One answer, its scores, and the documents that the prompt held (indices, best first)."""

    question: str
    expected: str
    answer: str
    documents: list[int]
    exact_match: float
    f1: float


@dataclass(frozen=True)
class AnswerReport:
    """Exact match and F1 per setting."""

    questions: int
    documents: int
    tokens: int
    exact_match: dict[str, Estimate]
    f1: dict[str, Estimate]
    gap_closed: dict[str, dict[str, Estimate]]  # setting -> metric: 0 is closed book, 1 is gold given
    documents_read: dict[str, float]  # setting -> mean number of documents in the prompt
    gold_read: dict[str, float]  # setting -> mean fraction of the gold documents among them
    seconds: dict[str, float]
    answers: dict[str, list[Answer]]
    environment: Environment

    def to_dict(self) -> dict:
        """Plain data for JSON, every answer included."""
        return asdict(self)


def evaluate_answers(
    model: Any,
    tokenizer: Any,
    benchmark: HotpotQA,
    memory: Any = None,
    *,
    questions: int | None = 200,
    max_new_tokens: int = 16,
    question_batch: int = 8,
    mode: str | None = None,
    cache_dir: str | Path | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> AnswerReport:
    """Answers the first `questions` questions (None: all) in every setting, greedily.

    `memory` is the MemoryBank of ALL the benchmark's documents; None encodes them, or reads the bank that an
    earlier run left in `cache_dir`. `mode` ranks its documents: "router", "lexical" or "fused" (None: the
    model's default). Raises ValueError if it holds other documents.
    """
    if memory is None:
        memory = benchmark_memory(model, tokenizer, benchmark.documents, cache_dir, batch_tokens, progress)
    elif list(memory.documents) != list(benchmark.documents):
        raise ValueError(
            "memory must hold the benchmark's documents in their order: build it from them, or pass None"
        )
    asked = benchmark.first(questions)

    def given(documents: list[list[int]]) -> tuple[list[str], list[list[int]]]:
        texts = answer_given(model, tokenizer, asked, documents, max_new_tokens, question_batch)
        return texts, documents

    def remembered(mode: str | None) -> tuple[list[str], list[list[int]]]:
        return ask_memory(model, tokenizer, asked.questions, memory, max_new_tokens, question_batch, mode)

    nothing, gold = [[] for _ in asked.questions], [list(row) for row in asked.gold]
    runs: dict[str, Callable[[], tuple[list[str], list[list[int]]]]] = {
        CLOSED_BOOK: lambda: given(nothing),
        MEMORY: lambda: remembered(mode),
        ROUTERS: lambda: remembered("router"),
        GOLD: lambda: given(gold),
    }
    answers, seconds = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        texts, used = run()
        seconds[name] = time.perf_counter() - start
        answers[name] = score_answers(asked, texts, used)
    read = {name: [answer.documents for answer in answers[name]] for name in (MEMORY, ROUTERS)}
    return AnswerReport(
        questions=len(asked),
        documents=len(benchmark.documents),
        tokens=int(memory.num_tokens),
        **summarize(answers),
        documents_read={name: sum(map(len, rows)) / len(rows) for name, rows in read.items()},
        gold_read={
            name: float(metrics.recall_at(rows, asked.gold, len(benchmark.documents)).mean())
            for name, rows in read.items()
        },
        seconds=seconds,
        answers=answers,
        environment=describe_environment(model.device),
    )


def answer_given(
    model: Any,
    tokenizer: Any,
    benchmark: HotpotQA,
    documents: list[list[int]],
    max_new_tokens: int,
    size: int,
) -> list[str]:
    """Answers from given documents (indices, best first), with the prompt and decoding that memory uses."""
    texts = [[benchmark.documents[i] for i in row] for row in documents]
    answers: list[str] = []
    for start in range(0, len(benchmark), size):
        batch = slice(start, start + size)
        questions = list(benchmark.questions[batch])
        answers += model.answer_from(questions, texts[batch], tokenizer, max_new_tokens=max_new_tokens)
    return answers


def ask_memory(
    model: Any,
    tokenizer: Any,
    questions: tuple[str, ...],
    memory: Any,
    max_new_tokens: int,
    size: int,
    mode: str | None = None,
) -> tuple[list[str], list[list[int]]]:
    """Answers by router-directed interleave, and the documents that the prompts held, first found first."""
    texts: list[str] = []
    used: list[list[int]] = []
    for start in range(0, len(questions), size):
        batch = list(questions[start : start + size])
        inputs = tokenizer(
            batch, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        out = model.generate(
            **inputs.to(model.device),
            memory=memory,
            tokenizer=tokenizer,
            retrieval="router",
            mode=mode,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        texts.extend(out.answers)
        used.extend([document.id for turn in rounds for document in turn.documents] for rounds in out.rounds)
    return texts, used


def score_answers(benchmark: HotpotQA, texts: list[str], documents: list[list[int]]) -> list[Answer]:
    """Every answer with its exact match and HotpotQA F1."""
    rows = zip(benchmark.questions, benchmark.answers, texts, documents, strict=True)
    return [
        Answer(
            question,
            expected,
            text,
            ids,
            metrics.exact_match(text, expected),
            metrics.hotpot_f1(text, expected),
        )
        for question, expected, text, ids in rows
    ]


def summarize(answers: dict[str, list[Answer]]) -> dict[str, dict]:
    """Intervals per setting, and the part of the gap that memory closes, for exact match and F1."""
    values = {
        metric: {name: [getattr(answer, metric) for answer in rows] for name, rows in answers.items()}
        for metric in ("exact_match", "f1")
    }
    summary: dict[str, dict] = {
        metric: {name: metrics.bootstrap(row) for name, row in rows.items()}
        for metric, rows in values.items()
    }
    summary["gap_closed"] = {
        name: {
            metric: metrics.gap_closed(rows[CLOSED_BOOK], rows[name], rows[GOLD])
            for metric, rows in values.items()
        }
        for name in (MEMORY, ROUTERS)
    }
    return summary


def render(report: AnswerReport) -> str:
    """The report as a text table."""
    lines = [
        f"Answers: {report.questions:,} questions, memory of {report.documents:,} documents "
        f"({report.tokens:,} tokens)",
        str(report.environment),
        "",
        f"{'':13} {'exact match':>20} {'F1':>20} {'s/question':>11}",
    ]
    for name in (CLOSED_BOOK, MEMORY, ROUTERS, GOLD):
        pace = report.seconds[name] / report.questions
        lines.append(
            f"{name:13} {str(report.exact_match[name]):>20} {str(report.f1[name]):>20} {pace:>11.2f}"
        )
    lines += ["", "way from closed book (0) to gold given (1):"]
    for name, gap in report.gap_closed.items():
        lines.append(
            f"{name:13} {str(gap['exact_match']):>20} {str(gap['f1']):>20}   "
            f"{report.documents_read[name]:.1f} documents read, {report.gold_read[name]:.0%} of the gold"
        )
    return "\n".join(lines)
