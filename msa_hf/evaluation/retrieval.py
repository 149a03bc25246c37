"""Retrieval quality: routers, BM25, both fused, and a sentence encoder, over the same questions in one run.

Every system ranks all documents of the memory for every question from the question alone. Reported are recall
at 1, 4 and 16 (the mean fraction of a question's gold documents), all gold documents within 16, and MRR, with
paired bootstrap intervals over the questions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msa_hf.evaluation import metrics
from msa_hf.evaluation.cached_memory import benchmark_memory, cached_embeddings
from msa_hf.evaluation.environment import Environment, describe_environment
from msa_hf.evaluation.hotpotqa import HotpotQA
from msa_hf.evaluation.metrics import Estimate
from msa_hf.evaluation.sentence_encoder import SentenceEncoder, nearest
from msa_hf.modeling.lexical import LexicalIndex
from msa_hf.modeling.retrieval_msa import consensus, lexical_scores, rank

RECALL_CUTS = (1, 4, 16)
DEPTH = 100  # documents ranked per question: MRR counts nothing below

ROUTER, FUSED, ENCODER = "routers", "fused", "MiniLM-L6"
LEXICAL, TUNED, BM25 = "lexical", "BM25 tuned", "BM25"


@dataclass(frozen=True)
class SystemResult:
    """One system's means over the questions, by metric name."""

    name: str
    metrics: dict[str, Estimate]
    seconds: float  # per question; the routers, their layers and the fusion share one routing


@dataclass(frozen=True)
class RetrievalReport:
    """All systems over one memory, and the paired differences that the claims rest on."""

    questions: int
    documents: int
    tokens: int
    router_layers: list[int]
    systems: list[SystemResult]
    differences: dict[str, dict[str, Estimate]]  # "fused - BM25" -> metric -> estimate
    memory_seconds: float
    environment: Environment

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def system(self, name: str) -> SystemResult:
        """The result of a system by its name; KeyError with the known names."""
        for result in self.systems:
            if result.name == name:
                return result
        raise KeyError(f"no system {name!r} in this report, only {[result.name for result in self.systems]}")


def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    benchmark: HotpotQA,
    memory: Any = None,
    *,
    encoder: SentenceEncoder | str | Path | None = None,
    with_encoder: bool = True,
    cache_dir: str | Path | None = None,
    question_batch: int = 32,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> RetrievalReport:
    """Ranks the benchmark's documents with every system.

    `memory` is the MemoryBank of the benchmark's documents; None encodes them, or reads the bank that
    an earlier run left in `cache_dir`. `encoder` is the peer or its folder (None: all-MiniLM-L6-v2), left
    out with `with_encoder=False`. Raises ValueError if `memory` holds other documents than the benchmark.
    """
    start = time.perf_counter()
    if memory is None:
        memory = benchmark_memory(model, tokenizer, benchmark.documents, cache_dir, batch_tokens, progress)
    elif list(memory.documents) != list(benchmark.documents):
        raise ValueError(
            "memory must hold the benchmark's documents in their order: build it from them, or pass None"
        )
    memory_seconds = time.perf_counter() - start

    questions = list(benchmark.questions)
    start = time.perf_counter()
    rankings = rank_with_model(model, tokenizer, questions, memory, question_batch)
    routing_seconds = time.perf_counter() - start
    seconds = dict.fromkeys(rankings, routing_seconds / len(questions))
    peers: dict[str, Callable[[], list[list[int]]]] = {
        TUNED: lambda: _searched(memory.lexical, questions),
        BM25: lambda: _searched(LexicalIndex.plain(benchmark.documents), questions),
    }
    if with_encoder:
        peers[ENCODER] = lambda: _embedded(encoder, questions, benchmark.documents, cache_dir)
    for name, run in peers.items():
        start = time.perf_counter()
        rankings[name] = run()
        seconds[name] = (time.perf_counter() - start) / len(questions)

    scores = {name: score_rankings(ids, benchmark) for name, ids in rankings.items()}
    results = [
        SystemResult(
            name, {metric: metrics.bootstrap(values) for metric, values in rows.items()}, seconds[name]
        )
        for name, rows in scores.items()
    ]
    return RetrievalReport(
        questions=len(benchmark),
        documents=len(benchmark.documents),
        tokens=int(memory.num_tokens),
        router_layers=list(memory.router_layers),
        systems=results,
        differences=_differences(scores),
        memory_seconds=memory_seconds,
        environment=describe_environment(model.device),
    )


def score_rankings(rankings: metrics.Rankings, benchmark: HotpotQA) -> dict[str, np.ndarray]:
    """Every metric of one system, per question [Q]."""
    gold = benchmark.gold
    rows = {f"recall@{k}": metrics.recall_at(rankings, gold, k) for k in RECALL_CUTS}
    rows["both@16"] = metrics.all_gold_at(rankings, gold, 16)
    rows["MRR"] = metrics.reciprocal_rank(rankings, gold)
    return rows


def _differences(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Estimate]]:
    pairs = [(FUSED, BM25), (FUSED, LEXICAL), (FUSED, ENCODER), (ROUTER, BM25), (ROUTER, ENCODER)]
    return {
        f"{left} - {right}": {
            metric: metrics.paired_difference(values, scores[right][metric])
            for metric, values in scores[left].items()
        }
        for left, right in pairs
        if left in scores and right in scores
    }


def rank_with_model(
    model: Any, tokenizer: Any, questions: Sequence[str], memory: Any, question_batch: int
) -> dict[str, list[list[int]]]:
    """The routers' consensus, its fusion with the lexical index, that alone, and each layer, from one
    routing.

    The first three are what `model.rank_documents` gives.
    """
    rankings: dict[str, list[list[int]]] = {ROUTER: [], FUSED: [], LEXICAL: []}
    for start in range(0, len(questions), question_batch):
        batch = list(questions[start : start + question_batch])
        scores = model.route_questions(batch, memory, tokenizer=tokenizer)
        totals = consensus(scores, model.config.consensus_weights)
        for row, question in enumerate(batch):
            lexical = lexical_scores(memory, question)
            for name, mode in ((ROUTER, "router"), (FUSED, "fused"), (LEXICAL, "lexical")):
                ranking = rank(memory, totals[row], lexical, mode)
                rankings[name].append([number for number, _ in ranking[:DEPTH]])
        if len(scores) > 1:
            for layer, values in scores.items():
                best = values.topk(min(DEPTH, values.shape[1]), dim=1).indices.tolist()
                rankings.setdefault(f"layer {layer}", []).extend(best)
    return rankings


def _searched(index: LexicalIndex, questions: list[str]) -> list[list[int]]:
    return [[number for number, _ in index.search(question, DEPTH)] for question in questions]


def _embedded(encoder, questions, documents, cache_dir) -> list[list[int]]:
    if not isinstance(encoder, SentenceEncoder):
        encoder = SentenceEncoder(encoder)
    vectors = cached_embeddings(encoder.fingerprint(), documents, encoder.encode, cache_dir)
    return nearest(encoder.encode(questions), vectors, DEPTH)


def render(report: RetrievalReport) -> str:
    """The report as a text table."""
    names = list(report.systems[0].metrics)
    width = max(len(name) for name in [*report.differences, *(s.name for s in report.systems)])
    lines = [
        f"Retrieval: {report.questions:,} questions over {report.documents:,} documents "
        f"({report.tokens:,} tokens)",
        str(report.environment),
        "",
        " ".join([" " * width, *(f"{name:^20}" for name in names)]),
    ]
    lines += [_row(result.name, result.metrics, width) for result in report.systems]
    lines += ["", "Paired differences (95 % bootstrap intervals):"]
    lines += [_row(name, rows, width) for name, rows in report.differences.items()]
    return "\n".join(lines)


def _row(name: str, rows: dict[str, Estimate], width: int) -> str:
    return " ".join([f"{name:<{width}}", *(f"{str(estimate):>20}" for estimate in rows.values())])


def save_plot(report: RetrievalReport, path: str | Path) -> None:
    """Bars of recall per system with their intervals. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    bar = 0.8 / len(report.systems)
    cuts = [f"recall@{k}" for k in RECALL_CUTS] + ["both@16"]
    for number, result in enumerate(report.systems):
        estimates = [result.metrics[cut] for cut in cuts]
        means = np.array([e.mean for e in estimates])
        errors = np.abs(np.array([[e.low for e in estimates], [e.high for e in estimates]]) - means)
        axes.bar(np.arange(len(cuts)) + number * bar, means, bar, yerr=errors, capsize=2, label=result.name)
    axes.set_xticks(np.arange(len(cuts)) + 0.4 - bar / 2, cuts)
    axes.set_ylim(0, 1)
    axes.set_title(
        f"{report.questions:,} questions, {report.documents:,} documents, {report.tokens:,} tokens"
    )
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
