"""Questions to a memory, answered with the passages that were read and how they were found."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .modeling.interleave_msa import left_pad, pad_id
from .modeling.memory_bank import MemoryBank
from .store import MemoryStore, StoreError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A passage that an answer was given from.

    Attributes:
        document: its number in the memory; id, namespace, title, source: as it was ingested, empty if that is
            unknown. Only the documents of a store have a namespace.
        round, rank: round of retrieval that found it, and its place among what this round found.
        router_rank, router_score: its rank among all documents, and consensus, by the routers alone.
        score: what it was ranked by; lexical: its BM25 score, if words were looked at and shared.
    """

    document: int
    id: str
    namespace: str
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
    """An answer with its sources, in the order in which they were found.

    `earlier` are the questions and answers that the question was asked with, see `ask`.
    """

    question: str
    answer: str
    sources: list[Source]
    retrieval: str
    routers_trained: bool
    seconds: float
    earlier: list[tuple[str, str]] = field(default_factory=list)

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
    earlier: Sequence[tuple[str, str]] = (),
    **generate_options,
) -> Reply:
    """Answers one question from `memory`, a bank or that of a store: `store.bank()`.

    Args:
        retrieval: see `generate`.
        k: documents in the prompt at most ("router"), or documents attended to per layer ("attention").
        rounds: rounds of retrieval at most, of "router" and "generative".
        mode: what ranks documents for "router": "fused", "router" or "lexical". By default the model's own
            choice, but "lexical" while its routers are untrained, whose ranking would only add noise.
        earlier: questions with their answers that this question refers to, oldest first. They route with it
            and stand before it in the prompt.
        generate_options: streamer, stopping_criteria, do_sample and the like, for `generate`.

    Raises:
        ValueError: an empty question, or an option that `generate` refuses.
    """
    options = {"retrieval": retrieval, "k": k, "rounds": rounds, "mode": mode, **generate_options}
    return ask_together(
        model, tokenizer, memory, [question], max_new_tokens=max_new_tokens, earlier=[earlier], **options
    )[0]


def ask_together(
    model,
    tokenizer,
    memory: MemoryBank,
    questions: Sequence[str],
    *,
    retrieval: str = "auto",
    k: int | None = None,
    rounds: int | None = None,
    mode: str | None = None,
    max_new_tokens: int = 32,
    earlier: Sequence[Sequence[tuple[str, str]]] | None = None,
    **generate_options,
) -> list[Reply]:
    """Answers several questions in one batch; see `ask`. `earlier` has one list per question."""
    questions = [question.strip() for question in questions]
    if not all(questions):
        raise ValueError("the question must not be empty")
    before = [()] * len(questions) if earlier is None else earlier
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
    texts = [with_earlier(question, own) for question, own in zip(questions, before)]
    rows = [torch.tensor(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ids, mask = left_pad(rows, pad_id(tokenizer), model.device)
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        memory=memory,
        tokenizer=tokenizer,
        retrieval=retrieval,
        return_dict_in_generate=True,
        **{"do_sample": False, **options, **generate_options},
    )
    seconds = time.perf_counter() - start
    trained = bool(model.config.routers_trained)
    replies = []
    for row, question in enumerate(questions):
        sources = [
            _source(memory, document, number, rank)
            for number, part in enumerate(output.rounds[row], 1)
            for rank, document in enumerate(part.documents, 1)
        ]
        answer = output.answers[row].strip()
        replies.append(Reply(question, answer, sources, retrieval, trained, seconds, list(before[row])))
    return replies


def with_earlier(question: str, earlier: Sequence[tuple[str, str]]) -> str:
    """A question after those that it refers to, as prompts write them; they put "Question: " before it."""
    asked = [*(question for question, _ in earlier), question]
    answers = [answer for _, answer in earlier]
    return asked[0] + "".join(
        f"\nAnswer: {answer}\n\nQuestion: {following}" for answer, following in zip(answers, asked[1:])
    )


def note_use(store: str | Path, sources: Iterable[Source], model=None, tokenizer=None) -> None:
    """Counts the sources of an answer as used, for their store's budget; not while another writer has it.

    Args:
        store: its folder, which is opened for writing and closed again. model, tokenizer: give back their
            precision to documents that had lost it.
    """
    used: dict[str, list[str]] = {}
    for source in sources:
        used.setdefault(source.namespace, []).append(source.id)
    if not used:
        return
    try:
        with MemoryStore.open(store, model, tokenizer) as opened:
            for namespace, ids in used.items():
                opened.record_use(ids, namespace)
    except StoreError as error:
        logger.info("the use of %d documents was not counted: %s", sum(map(len, used.values())), error)


def _source(memory: MemoryBank, document, number: int, rank: int) -> Source:
    text = memory.documents[document.id]
    kept = memory.metadata.get("documents") or []
    known = kept[document.id] if document.id < len(kept) else {}
    return Source(
        document=document.id,
        id=known.get("id", ""),
        namespace=known.get("namespace", ""),
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
