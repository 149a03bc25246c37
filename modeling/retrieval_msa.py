"""From routing scores to ranked documents: the layers' consensus, its fusion with BM25, and what is reported.

Axis letters: B questions, N documents.
"""

from dataclasses import dataclass, field

import torch

from .cache_memory import top_documents

# Of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, who use 60); chosen on held-out questions
# (LOG.md).
RECIPROCAL_RANK_OFFSET = 5
FUSION_DEPTH = 1000  # ranks beyond it hardly add to a fused score
MODES = ("fused", "router", "lexical")


@dataclass(frozen=True)
class RankedDocument:
    """A document that retrieval chose.

    Attributes:
        id: number in the memory. score: what it was ranked by (fused, consensus or BM25).
        router_rank: its rank (from 1) by the routers alone, whatever it was ranked by. consensus: its
            consensus score.
        per_layer: score in each router layer. lexical: BM25 score, None without the lexical prior or a
            common word.
    """

    id: int
    score: float
    router_rank: int
    consensus: float
    per_layer: dict[int, float] = field(default_factory=dict)
    lexical: float | None = None


@dataclass(frozen=True)
class RetrievalRound:
    """One round of retrieval for one question.

    Attributes:
        query: the text that routed. documents: new documents of this round, best first.
        selected: in attention retrieval, (document, score) best first by router layer.
    """

    query: str
    documents: list[RankedDocument]
    selected: dict[int, list[tuple[int, float]]] = field(default_factory=dict)


def consensus(scores: dict[int, torch.Tensor], weights: list[float] | None) -> torch.Tensor:
    """[B, N]: weighted sum over layers of each layer's scores [B, N], standardised over the documents of a
    question.

    Documents without a score (-inf) stay at -inf.
    """
    total = 0.0
    for weight, (_, layer) in zip(weights or [1.0] * len(scores), sorted(scores.items())):
        known = layer > -torch.inf
        count = known.sum(1, keepdim=True).clamp(min=1)
        values = layer.masked_fill(~known, 0.0)
        mean = values.sum(1, keepdim=True) / count
        deviation = (values - mean).masked_fill(~known, 0.0).square().sum(1, keepdim=True).div(count).sqrt()
        total = total + weight * ((layer - mean) / deviation.clamp(min=1e-6))
    return total


def lexical_scores(memory, question: str, k: int = 0) -> dict[int, float]:
    """BM25 by document, at least k documents deep."""
    return dict(memory.lexical.search(question, max(k, FUSION_DEPTH)))


def rank(
    memory, router: torch.Tensor, lexical: dict[int, float] | None, mode: str, depth: int = FUSION_DEPTH
) -> list[tuple[int, float]]:
    """At most `depth` (document, score) of one question, best first, equal scores by number.

    Args:
        router: [N] consensus. lexical: BM25 by document.
        mode: "router" (the consensus alone), "lexical" (BM25) or "fused" (reciprocal ranks of both). With
            words, titles are read, too: what the best documents mention by title rises behind them.
    """
    best = top_documents(router[None], depth)[0]
    routed = list(zip(best.tolist(), router[best].tolist()))
    if mode == "router":
        return routed
    found = sorted(lexical.items(), key=lambda item: (-item[1], item[0]))[:depth]
    if mode == "fused":
        fused: dict[int, float] = {}
        for ranking in (routed, found):
            for position, (i, _) in enumerate(ranking, start=1):
                fused[i] = fused.get(i, 0.0) + 1.0 / (RECIPROCAL_RANK_OFFSET + position)
        found = sorted(fused.items(), key=lambda item: (-item[1], item[0]))
    return memory.lexical.follow_links(found, memory.documents)[:depth]


def describe(
    memory,
    scores: dict[int, torch.Tensor],
    row: int,
    weights: list[float] | None,
    lexical: dict[int, float] | None,
    ranking: list[tuple[int, float | None]] | None = None,
    mode: str = "router",
    k: int = 16,
) -> list[RankedDocument]:
    """What is known about the documents of `ranking` for question `row`; by default the k best by `mode`.

    A score of None in `ranking` means the consensus.
    """
    rows = {layer: layer_scores[row : row + 1] for layer, layer_scores in scores.items()}
    router = consensus(rows, weights)[0]
    if ranking is None:
        ranking = rank(memory, router, lexical, mode, max(k, FUSION_DEPTH))[:k]
    return [
        RankedDocument(
            id=i,
            score=float(router[i]) if score is None else score,
            router_rank=int((router > router[i]).sum() + (router[:i] == router[i]).sum()) + 1,
            consensus=float(router[i]),
            per_layer={layer: float(values[0, i]) for layer, values in rows.items()},
            lexical=None if lexical is None else lexical.get(i),
        )
        for i, score in ranking
    ]
