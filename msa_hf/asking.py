"""Questions to a memory, answered with the passages that were read and how they were found."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from .modeling.memory_bank import MemoryBank


@dataclass(frozen=True)
class Source:
    """A passage that an answer was given from.

    Attributes:
        document: its number in the memory; id, title, source: as it was ingested, empty if that is unknown.
        round, rank: round of retrieval that found it, and its place among what this round found.
        router_rank, router_score: its rank among all documents, and consensus, by the routers alone.
        score: what it was ranked by; lexical: its BM25 score, if words were looked at and shared.
    """

    document: int
    id: str
    title: str
    source: str
    round: int
    rank: int
    score: float
    router_rank: int
    router_score: float
    lexical: float | None
    per_layer: dict[int, float]
    text: str


@dataclass(frozen=True)
class Reply:
    """An answer with its sources, in the order in which they were found."""

    question: str
    answer: str
    sources: list[Source]
    retrieval: str
    routers_trained: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def ask(
    model,
    tokenizer,
    memory: MemoryBank,
    question: str,
    *,
    retrieval: str = "auto",
    k: int | None = None,
    rounds: int | None = None,
    mode: str | None = None,
    max_new_tokens: int = 32,
) -> Reply:
    """Answers one question from `memory`.

    Args:
        retrieval: see `generate`.
        k: documents in the prompt at most ("router"), or documents attended to per layer ("attention").
        rounds: rounds of retrieval at most, of "router" and "generative".
        mode: what ranks documents for "router": "fused", "router" or "lexical". By default the model's own
            choice, but "lexical" while its routers are untrained, whose ranking would only add noise.

    Raises:
        ValueError: an empty question, or an option that `generate` refuses.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question must not be empty")
    retrieval = model.config.retrieval if retrieval == "auto" else retrieval
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if retrieval == "router":
        options["mode"] = mode
        if k is not None:
            options |= {"max_documents": k, "documents_per_round": max(1, k - k // 4)}
    elif retrieval == "attention" and k is not None:
        options["top_k_documents"] = k
    if retrieval != "attention" and rounds is not None:
        options["max_rounds"] = rounds
    inputs = tokenizer(question, return_tensors="pt", add_special_tokens=False).to(model.device)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        memory=memory,
        tokenizer=tokenizer,
        retrieval=retrieval,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - start
    found = output.rounds[0] if output.rounds else []
    sources = [
        _source(memory, document, number, rank)
        for number, part in enumerate(found, 1)
        for rank, document in enumerate(part.documents, 1)
    ]
    trained = bool(model.config.routers_trained)
    return Reply(question, output.answers[0].strip(), sources, retrieval, trained, seconds)


def _source(memory: MemoryBank, document, number: int, rank: int) -> Source:
    text = memory.documents[document.id]
    kept = memory.metadata.get("documents") or []
    known = kept[document.id] if document.id < len(kept) else {}
    return Source(
        document=document.id,
        id=known.get("id", ""),
        title=known.get("title") or text.split("\n", 1)[0][:100],
        source=known.get("source", ""),
        round=number,
        rank=rank,
        score=document.score,
        router_rank=document.router_rank,
        router_score=document.consensus,
        lexical=document.lexical,
        per_layer=document.per_layer,
        text=text,
    )
