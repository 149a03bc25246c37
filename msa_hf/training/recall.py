"""Ranking figures and the layers' consensus. Axis letters: B questions, N documents."""

import numpy as np
import torch
from torch.nn import functional as F

from .layer_router import contrastive_loss


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """[B, N] with mean 0 and standard deviation 1 over the documents of each question."""
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0).clamp(min=1e-6)


def document_ranks(scores: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """[B, N] rank (from 1) of every document in the weighted sum of the layers' standardised scores."""
    total = sum(weight * standardise(layer) for layer, weight in zip(scores, weights))
    order = total.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(1, order.shape[1] + 1).expand_as(order))


def recall_figures(ranks: torch.Tensor, positives: list[np.ndarray]) -> dict[str, float]:
    """recall@1/4/16 (mean fraction of the positives found), all within 16, reciprocal rank of the first."""
    found = [row[torch.from_numpy(ids)].float() for row, ids in zip(ranks, positives)]
    figures = {f"recall@{k}": [float((row <= k).float().mean()) for row in found] for k in (1, 4, 16)}
    figures["all@16"] = [float((row <= 16).all()) for row in found]
    figures["mrr"] = [1 / float(row.min()) for row in found]
    return {name: round(float(np.mean(values)), 4) for name, values in figures.items()}


def consensus_weights(
    scores: list[torch.Tensor], positives: list[np.ndarray], steps: int = 200
) -> list[float]:
    """Weights >= 0 of the layers, with mean 1, that minimise the contrastive loss of their consensus."""
    if len(scores) == 1:
        return [1.0]
    stacked = torch.stack([standardise(layer) for layer in scores])
    marked = torch.zeros(stacked.shape[1:], dtype=torch.bool)
    for row, ids in zip(marked, positives):
        row[torch.from_numpy(ids)] = True
    raw = torch.zeros(len(scores), requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(steps):
        loss = contrastive_loss(torch.einsum("l,lbn->bn", F.softplus(raw), stacked), marked, temperature=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = F.softplus(raw.detach())
    return [round(float(weight), 4) for weight in weights / weights.mean()]
