"""Auxiliary losses on routing scores (paper section 3.3, eq. 5) in the variants that the reference names.

Scores are those of one sample and layer: [n] over its documents; positives: [n] bool.
"""

import torch
from torch.nn import functional as F


def infonce(
    scores: torch.Tensor, positives: torch.Tensor, temperature: float, gamma: float = 0.0
) -> torch.Tensor:
    """Mean over positives of -(1 - p)^gamma log p, p the softmax over all documents."""
    log_p = F.log_softmax(scores / temperature, dim=-1)[positives]
    return -((1 - log_p.exp()).pow(gamma) * log_p).mean()


def decoupled_infonce(
    scores: torch.Tensor, positives: torch.Tensor, temperature: float, gamma: float = 0.0
) -> torch.Tensor:
    """As `infonce`, but other positives are not in a positive's denominator (paper eq. 5)."""
    logits = scores / temperature
    negatives = torch.logsumexp(logits.masked_fill(positives, -torch.inf), dim=-1)
    log_p = logits[positives] - torch.logaddexp(logits[positives], negatives)
    return -((1 - log_p.exp()).pow(gamma) * log_p).mean()


def binary_cross_entropy(scores: torch.Tensor, positives: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss with a learnt bias, as in SigLIP."""
    signs = positives.to(scores.dtype) * 2 - 1
    return -F.logsigmoid((scores + bias) * signs).mean()


def document_loss(
    config, document_scores: dict[int, torch.Tensor], labels: list[list[int]], bias: torch.Tensor | None
) -> torch.Tensor:
    """Mean over samples and router layers of `config.aux_loss_method`.

    As in the reference, only layers of the upper half take part, scores of -inf (documents the sample does
    not have) are left out, and samples without labels or without a positive are skipped.

    Args:
        document_scores: [B, N] by router layer. labels: per sample one 0/1 per document that it has. bias:
            of BCE.
    """
    method, temperature = config.aux_loss_method, min(max(config.aux_temperature, 0.001), 0.5)
    losses = []
    for scores, positives in _samples(config, document_scores, labels):
        if method == "BCE":
            losses.append(binary_cross_entropy(scores, positives, bias))
        elif positives.any():
            loss = decoupled_infonce if "DECOUPLE" in method else infonce
            losses.append(loss(scores, positives, temperature, gamma=2.0 if "FOCAL" in method else 0.0))
    if not losses:
        return next(iter(document_scores.values())).new_zeros(())
    return torch.stack(losses).mean()


@torch.no_grad()
def recall_metrics(
    config, document_scores: dict[int, torch.Tensor], labels: list[list[int]]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 (or all documents, if fewer), averaged over samples and layers as in
    `document_loss`."""
    found: dict[str, list[float]] = {}
    for scores, positives in _samples(config, document_scores, labels):
        if positives.any():
            for n in (min(n, len(scores)) for n in (1, 5, 10)):
                hits = int(positives[scores.topk(n).indices].sum())
                found.setdefault(f"recall@{n}", []).append(hits / min(int(positives.sum()), 10))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _samples(config, document_scores: dict[int, torch.Tensor], labels: list[list[int]]):
    """(scores [n], positives [n] bool) of every sample and every layer that takes part."""
    for layer, scores in document_scores.items():
        if layer < config.num_hidden_layers // 2:
            continue
        if len(labels) != len(scores):
            raise ValueError(
                f"batch_aux_labels must have one list per sample ({len(scores)}); got {len(labels)}"
            )
        for row, label in zip(scores, labels):
            row = row[row > -torch.inf]
            if len(label) not in (0, len(row)):
                raise ValueError(
                    f"batch_aux_labels must have one label per document ({len(row)}); got {len(label)}"
                )
            if label:
                yield row, torch.tensor(label, device=row.device).bool()
