"""The two linear maps of one router layer, trained on stored states (paper section 3.3, eq. 5).

Axis letters: B questions, T tokens of all questions, R chunks, N documents, E hidden size, W = G * D.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.configuration_msa import MSAConfig

_WHITENING_SAMPLE = 50_000
_MEAN_DAMPING = 0.25
_SOFT_MAX = (
    0.1  # temperature of the soft maximum over question tokens; a hard one leaves fresh routers at chance
)


@dataclass(frozen=True)
class DocumentBatch:
    """Chunks of some documents, ordered by chunk count so that documents of one count reduce as one block.

    Attributes:
        documents: [N] ids. rows: [R] rows of the stored chunks.
        groups: (chunks per document, number of documents), ascending.
    """

    documents: np.ndarray
    rows: np.ndarray
    groups: list[tuple[int, int]]

    @classmethod
    def of(cls, documents: np.ndarray, offsets: np.ndarray) -> "DocumentBatch":
        counts = offsets[documents + 1] - offsets[documents]
        order = np.argsort(counts, kind="stable")
        documents, counts = documents[order], counts[order]
        shift = offsets[documents] - np.concatenate([[0], np.cumsum(counts)[:-1]])
        sizes, numbers = np.unique(counts, return_counts=True)
        return cls(
            documents,
            np.arange(counts.sum()) + np.repeat(shift, counts),
            list(zip(sizes.tolist(), numbers.tolist())),
        )


def whitening(states: np.ndarray, seed: int) -> torch.Tensor:
    """[E, E] map that gives `states` [R, E] about unit covariance and damps their mean direction.

    No direction then drowns the others. It is linear and folded into the weights of the router. Undamped, the
    mean would be most of a whitened vector (89 of 92 in length in layer 8 of SmolLM2).
    """
    rows = np.random.default_rng(seed).permutation(len(states))[:_WHITENING_SAMPLE]
    sample = torch.from_numpy(np.asarray(states[np.sort(rows)], dtype=np.float32))
    covariance = torch.cov(sample.T, correction=0).view(states.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    white = (vectors / values.clamp(min=1e-3 * float(values.mean())).sqrt()).T
    mean = F.normalize(white @ sample.mean(0), dim=0)
    return white - (1 - _MEAN_DAMPING) * torch.outer(mean, mean @ white)


class LayerRouter(nn.Module):
    """Router projections in whitened coordinates.

    Query and key maps start as the same random rotation (query heads of a group as their key head), so that
    equal states match before any training.
    """

    def __init__(self, config: MSAConfig, white: torch.Tensor, seed: int):
        super().__init__()
        if config.head_reduction != "mean":
            raise ValueError(f'head_reduction must be "mean" to train routers; got {config.head_reduction!r}')
        self.config, hidden = config, white.shape[0]
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.register_buffer("white", white)
        generator = torch.Generator().manual_seed(seed)
        size = max(hidden, self.groups * self.head_dim)
        rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        key = rotation[: self.groups * self.head_dim, :hidden]
        shared = key.view(self.groups, 1, self.head_dim, hidden)
        query = shared.expand(-1, self.heads // self.groups, -1, -1).reshape(-1, hidden)
        self.key, self.query = nn.Parameter(key.clone()), nn.Parameter(query.clone())

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """router_q_proj [H * D, E] and router_k_proj [G * D, E] for states that are not whitened."""
        return self._query_scale * self.query @ self.white, self.key @ self.white

    @property
    def _query_scale(self) -> float:
        """Brings the heads of whitened queries to a length of about 1, which matters where it counts."""
        return self.head_dim**-0.5 if self.config.score_normalization != "cosine" else 1.0

    def key_vectors(self, states: torch.Tensor) -> torch.Tensor:
        """[R, W] of whitened chunk states [R, E]."""
        keys = F.linear(states, self.key.to(states.dtype)).float()
        if self.config.score_normalization == "dot":
            return keys * self.head_dim**-0.5
        return F.normalize(keys.unflatten(-1, (self.groups, self.head_dim)), dim=-1).flatten(1)

    def query_vectors(self, states: torch.Tensor) -> torch.Tensor:
        """[T, W] of whitened token states [T, E]: query heads folded into one vector per group."""
        queries = F.linear(states, self.query.to(states.dtype)).float() * self._query_scale
        queries = queries.unflatten(-1, (self.groups, -1, self.head_dim))
        if self.config.score_normalization == "cosine":
            queries = F.normalize(queries, dim=-1)
        return queries.sum(2).flatten(1) / self.heads

    def scores(
        self, chunks: torch.Tensor, batch: DocumentBatch, tokens: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """[B, N] float32 scores of the documents of `batch`, in its order, for questions of `lengths` tokens.

        Args:
            chunks: [R, E] whitened states of `batch.rows`. tokens: [T, E] whitened states of the questions.
        """
        # [R, T], because documents reduce over neighbouring rows; the products run in the states' dtype.
        similarity = self.key_vectors(chunks).to(chunks.dtype) @ self.query_vectors(tokens).to(chunks.dtype).T
        if self.config.query_reduction == "maxsim":
            return self._over_tokens(_over_chunks(similarity, batch, "max"), lengths).T
        return _over_chunks(self._over_tokens(similarity, lengths), batch, self.config.chunk_reduction).T

    def _over_tokens(self, similarity: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[*, T] -> [*, B] by the config's query reduction."""
        parts = similarity.float().split(lengths, dim=1)
        kind = self.config.query_reduction
        if kind == "last":
            return torch.stack([part[:, -1] for part in parts], 1)
        if kind == "max" and self.training:
            return torch.stack([_SOFT_MAX * torch.logsumexp(part / _SOFT_MAX, 1) for part in parts], 1)
        return torch.stack([part.amax(1) if kind == "max" else part.mean(1) for part in parts], 1)


def _over_chunks(similarity: torch.Tensor, batch: DocumentBatch, reduction: str) -> torch.Tensor:
    """[R, *] -> [N, *]."""
    pieces, start = [], 0
    for size, number in batch.groups:
        block = similarity[start : start + size * number].view(number, size, -1)
        pieces.append(block.amax(1) if reduction == "max" else block.mean(1))
        start += size * number
    return torch.cat(pieces)


def contrastive_loss(scores: torch.Tensor, positives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Batched `modeling.losses_msa.decoupled_infonce`: scores and positives (bool) [B, N]."""
    logits = scores / temperature
    negatives = torch.logsumexp(
        logits.masked_fill(positives, torch.finfo(logits.dtype).min), dim=1, keepdim=True
    )
    losses = F.softplus(negatives - logits)
    return (losses * positives).sum(1).div(positives.sum(1)).mean()
