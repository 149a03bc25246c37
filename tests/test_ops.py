"""Pooling and routing against naive twins that follow the paper word for word."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from msa_hf.modeling import ops, routing_products
from msa_hf.modeling.cache_memory import top_documents
from msa_hf.modeling.lexical import LexicalIndex
from msa_hf.modeling.memory_bank import DenseVectors
from msa_hf.modeling.retrieval_msa import RECIPROCAL_RANK_OFFSET, consensus, rank

HEAD_DIM = 4


def naive_scores(queries, mask, keys, counts, head_reduction, query_reduction, chunk_reduction):
    """Scores per head, token and chunk, reduced one after the other."""
    batch, heads, _, _ = queries.shape
    groups = keys.shape[1] // HEAD_DIM
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    result = torch.full((batch, len(counts)), -torch.inf)
    for b in range(batch):
        question = queries[b][:, mask[b]]
        for i, count in enumerate(counts):
            if not count:
                continue
            rows = keys[starts[i] : starts[i + 1]].view(count, groups, HEAD_DIM)
            repeated = rows.repeat_interleave(heads // groups, dim=1).permute(1, 2, 0)
            table = question @ repeated
            table = table.mean(0) if head_reduction == "mean" else table.amax(0)
            if query_reduction == "maxsim":
                result[b, i] = table.amax(1).mean()
                continue
            per_chunk = {"max": table.amax(0), "mean": table.mean(0), "last": table[-1]}[query_reduction]
            result[b, i] = per_chunk.max() if chunk_reduction == "max" else per_chunk.mean()
    return result


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), max_size=9),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    shape=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    reductions=st.sampled_from(
        [(h, q, c) for h in ("mean", "max") for q in ("max", "mean", "last") for c in ("max", "mean")]
        + [("mean", "maxsim", "max")]
    ),
    tile=st.sampled_from([1, 7, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_document_scores_equal_the_naive_twin_whatever_the_tile(
    counts, batch, tokens, shape, reductions, tile, seed
):
    generator = torch.Generator().manual_seed(seed)
    heads, groups = shape
    queries = torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator)
    keys = torch.randn(sum(counts), groups * HEAD_DIM, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(tokens, (batch,), generator=generator)] = True
    before, routing_products.TILE_ELEMENTS = routing_products.TILE_ELEMENTS, tile
    try:
        names = dict(zip(("head_reduction", "query_reduction", "chunk_reduction"), reductions))
        scores = ops.document_scores(
            queries, mask, DenseVectors(keys), torch.tensor(counts, dtype=torch.int64), **names
        )
    finally:
        routing_products.TILE_ELEMENTS = before
    assert scores.shape == (batch, len(counts)) and scores.dtype == torch.float32
    torch.testing.assert_close(
        scores, naive_scores(queries, mask, keys, counts, *reductions), atol=1e-5, rtol=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_pooling_equals_a_mean_over_each_chunk(lengths, chunk, seed):
    states = torch.randn(len(lengths), max(lengths) + 1, 3, generator=torch.Generator().manual_seed(seed))
    states[:, -1] = torch.nan  # padding never counts, not even as 0 * nan
    expected = [
        row[start : min(start + chunk, length)].mean(0)
        for row, length in zip(states, lengths)
        for start in range(0, length, chunk)
    ]
    pooled = ops.pool_chunks(states, torch.tensor(lengths), chunk)
    expected = torch.stack(expected) if expected else torch.zeros(0, 3)
    torch.testing.assert_close(pooled, expected)


def test_pooling_accumulates_in_float32():
    states = torch.full((1, 64, 1), 1.0, dtype=torch.bfloat16)
    states[0, 0] = 256.0
    assert ops.pool_chunks(states, torch.tensor([64]), 64).item() == pytest.approx(319 / 64, rel=4e-3)


@pytest.mark.parametrize("documents", [0, 1, 5, 200])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_top_documents_is_a_stable_sort(documents, k):
    scores = torch.randint(0, 6, (4, documents), generator=torch.Generator().manual_seed(k)).float()
    scores[1] = -torch.inf
    for row, chosen in zip(scores, top_documents(scores, k)):
        order = sorted(
            (i for i in range(documents) if row[i] > -torch.inf), key=lambda i: (-float(row[i]), i)
        )
        assert chosen.tolist() == order[:k]


def test_consensus_is_a_weighted_sum_of_standard_scores():
    scores = {5: torch.tensor([[1.0, 2.0, 3.0, -torch.inf]]), 7: torch.tensor([[4.0, 4.0, 1.0, -torch.inf]])}

    def standard(row):
        return (row - row.mean()) / row.std(correction=0)

    expected = 2 * standard(scores[5][0, :3]) + 0.5 * standard(scores[7][0, :3])
    total = consensus(scores, [2.0, 0.5])[0]
    torch.testing.assert_close(total[:3], expected)
    assert total[3] == -torch.inf
    assert torch.isfinite(consensus({1: torch.ones(1, 3)}, None)).all()


def test_fusion_adds_reciprocal_ranks():
    """Oracle: the formula by hand. No text mentions another's title, so links change nothing."""
    texts = ["alpha\none", "beta\ntwo", "gamma\nthree", "delta\nfour"]
    memory = SimpleNamespace(documents=texts, lexical=LexicalIndex(texts))
    router, lexical = torch.tensor([0.1, 0.9, 0.5, -torch.inf]), {2: 7.0, 3: 5.0}
    assert [i for i, _ in rank(memory, router, lexical, "router")] == [1, 2, 0]
    assert [i for i, _ in rank(memory, router, lexical, "lexical")] == [2, 3]
    fused, first = dict(rank(memory, router, lexical, "fused")), RECIPROCAL_RANK_OFFSET + 1
    assert fused == pytest.approx(
        {2: 1 / (first + 1) + 1 / first, 1: 1 / first, 3: 1 / (first + 1), 0: 1 / (first + 2)}
    )
    assert list(fused) == [2, 1, 3, 0]
    assert [i for i, _ in rank(memory, router, lexical, "router", 2)] == [1, 2]


def test_titles_that_the_best_mention_rise_behind_them():
    texts = ["alpha\nmade by beta", "beta\ntwo", "gamma\nthree", "delta\nfour"]
    memory = SimpleNamespace(documents=texts, lexical=LexicalIndex(texts))
    router = torch.tensor([0.9, 0.1, 0.5, 0.4])
    assert [i for i, _ in rank(memory, router, None, "router")] == [0, 2, 3, 1]
    assert [i for i, _ in rank(memory, router, {0: 1.0}, "fused")][:2] == [0, 1]


def test_override_replaces_an_operation_and_backend_says_so():
    assert ops.backend()[0] == "torch"
    with ops.override(pool_chunks=lambda states, lengths, size: "mine"):
        assert ops.pool_chunks(None, None, 1) == "mine"
        assert ops.backend()[0] == "override"
    torch.testing.assert_close(ops.pool_chunks(torch.ones(1, 2, 1), torch.tensor([2]), 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="override knows"), ops.override(pool=len):
        pass


def test_routing_holds_no_tensor_per_head_and_token(monkeypatch):
    """Peak of the scores' tile does not depend on the number of heads."""
    largest = []
    original = routing_products.segment_scores
    monkeypatch.setattr(
        routing_products, "segment_scores", lambda v, *rest: largest.append(v.numel()) or original(v, *rest)
    )
    monkeypatch.setattr(routing_products, "TILE_ELEMENTS", 1000)
    keys = DenseVectors(F.normalize(torch.randn(4000, 16), dim=1))
    for heads in (4, 16, 64):
        queries, mask = torch.randn(1, heads, 10, HEAD_DIM), torch.ones(1, 10, dtype=torch.bool)
        ops.document_scores(queries, mask, keys, torch.full((1000,), 4), query_reduction="maxsim")
    assert max(largest) <= 1000
