"""One router layer's training: batches, hard negatives, evaluation on held-out questions, early stop.

Axis letters: B questions, N documents.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .features import RouterFeatures
from .layer_router import DocumentBatch, LayerRouter, contrastive_loss, whitening
from .recall import document_ranks, recall_figures

_SCORE_BLOCK = 20_000  # chunks scored at once against a block of questions
_MINING_BLOCK = 256  # questions


@dataclass(frozen=True)
class RouterTrainingConfig:
    """How routers are trained.

    Attributes:
        steps: optimiser steps per router layer.
        batch_size: questions per step; the documents of all of them are each other's negatives.
        learning_rate: peak, of AdamW on whitened coordinates; linear warm-up, then cosine decay.
        temperature: tau of the contrastive loss.
        hard_negatives: documents per question and step, drawn from the highest ranked that are not positive.
        mining_depth: how many such documents are kept per question; mined anew at the start of each round
            after the first, which has none.
        mining_rounds: number of equal parts of `steps`; 1 means no mining.
        mining_documents: size of the random part of the documents that is searched for hard negatives.
        token_dropout: fraction of a question's tokens left out of each training step.
        state_dropout: fraction of the whitened states' entries set to zero in each training step.
        held_out: questions kept for choosing the best step and the layers' weights; at most a quarter of all.
        eval_every: steps between two evaluations on them.
        patience: evaluations without a better recall@16 after which a layer stops.
        consensus: "uniform" layer weights, or "learned" on the held-out questions.
        seed: of the split, the initial weights and the order of questions.
        dtype: of the saved weights, "bfloat16" or "float32".
    """

    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    temperature: float = 0.02
    hard_negatives: int = 4
    mining_depth: int = 30
    mining_rounds: int = 2
    mining_documents: int = 8000
    token_dropout: float = 0.1
    state_dropout: float = 0.15
    held_out: int = 250
    eval_every: int = 200
    patience: int = 4
    consensus: str = "learned"
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "mining_depth",
            "mining_rounds",
            "mining_documents",
            "held_out",
            "eval_every",
            "patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("token_dropout", "state_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.hard_negatives < 0:
            raise ValueError(f"hard_negatives must be at least 0; got {self.hard_negatives}")
        if self.consensus not in ("uniform", "learned"):
            raise ValueError(f"consensus must be uniform or learned; got {self.consensus!r}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32; got {self.dtype!r}")


@dataclass
class TrainingQuestions:
    """Questions and documents as indices: positives and negatives are document ids by question."""

    questions: list[str]
    documents: list[str]
    positives: list[np.ndarray]
    negatives: list[np.ndarray]
    train: np.ndarray
    held_out: np.ndarray


class LayerTrainer:
    """One router layer: its whitened states in memory, its weights, its optimiser."""

    def __init__(
        self,
        model_config,
        layer: int,
        features: RouterFeatures,
        data: TrainingQuestions,
        config: RouterTrainingConfig,
    ):
        self.layer, self.features, self.data, self.config = layer, features, data, config
        self.router = LayerRouter(model_config, whitening(features.chunks[layer], config.seed), config.seed)
        self.chunks = self._whiten(features.chunks[layer])
        self.tokens = self._whiten(features.tokens[layer])
        self.corpus = DocumentBatch.of(np.arange(len(features.documents)), features.chunk_offsets)
        self.random = np.random.default_rng(config.seed)
        self.hard: dict[int, np.ndarray] = {}

    def run(self, record: Callable, advance: Callable) -> tuple[dict[str, float], torch.Tensor]:
        """Leaves the best weights in `router`; returns their figures and scores on the held-out questions."""
        config = self.config
        optimizer = torch.optim.AdamW(
            self.router.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        round_steps = -(-config.steps // config.mining_rounds)
        best, losses, stale, started = None, [], 0, time.perf_counter()
        queue: list[int] = []
        for step in range(config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                figures, scores = self.evaluate()
                loss = round(float(np.mean(losses)), 4) if losses else None
                losses.clear()
                record(
                    layer=self.layer,
                    step=step,
                    loss=loss,
                    seconds=round(time.perf_counter() - started, 1),
                    **figures,
                )
                merit = (figures["recall@16"], figures["mrr"])
                if best is None or merit > best[0]:
                    state = {name: value.clone() for name, value in self.router.state_dict().items()}
                    best, stale = (merit, figures, scores, state), 0
                else:
                    stale += 1
                if stale >= config.patience:
                    advance(config.steps - step)
                    break
            if step == config.steps:
                break
            if step and step % round_steps == 0 and config.hard_negatives:
                self._mine()
            if len(queue) < config.batch_size:
                queue = self.random.permutation(self.data.train).tolist()
            batch, queue = queue[: config.batch_size], queue[config.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config.steps)
            loss = self._loss(np.array(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(1)
        _, figures, scores, state = best
        self.router.load_state_dict(state)
        return figures, scores

    def evaluate(self) -> tuple[dict[str, float], torch.Tensor]:
        scores = self._score(self.corpus, self.data.held_out)
        positives = [self.data.positives[index] for index in self.data.held_out]
        return recall_figures(document_ranks([scores], [1.0]), positives), scores

    def _loss(self, batch: np.ndarray) -> torch.Tensor:
        data, parts = self.data, []
        for index in batch:
            parts += [data.positives[index], data.negatives[index]]
            if (found := self.hard.get(int(index))) is not None:
                parts.append(
                    self.random.choice(found, min(self.config.hard_negatives, len(found)), replace=False)
                )
        documents = DocumentBatch.of(np.unique(np.concatenate(parts)), self.features.chunk_offsets)
        self.router.train()
        chunks = F.dropout(self.chunks[torch.from_numpy(documents.rows)], self.config.state_dropout)
        scores = self.router.scores(chunks, documents, *self._dropped(*self._question_states(batch)))
        positives = torch.from_numpy(
            np.stack([np.isin(documents.documents, data.positives[index]) for index in batch])
        )
        return contrastive_loss(scores, positives, self.config.temperature)

    @torch.no_grad()
    def _mine(self) -> None:
        """For every training question, the best-ranked documents that are not positive."""
        total, data = len(self.features.documents), self.data
        chosen = self.random.permutation(total)[: self.config.mining_documents]
        searched = DocumentBatch.of(np.sort(chosen), self.features.chunk_offsets)
        for batch in np.array_split(data.train, -(-len(data.train) // _MINING_BLOCK)):
            for index, row in zip(batch, self._score(searched, batch)):
                row[torch.from_numpy(data.positives[index])] = -torch.inf
                keep = min(self.config.mining_depth, int(torch.isfinite(row).sum()))
                self.hard[int(index)] = row.topk(keep).indices.numpy()

    @torch.no_grad()
    def _score(self, batch: DocumentBatch, questions: np.ndarray) -> torch.Tensor:
        """[B, N] scores of the documents of `batch`, computed block by block; -inf for all others."""
        self.router.eval()
        states = self._question_states(questions)
        scores = torch.full((len(questions), len(self.features.documents)), -torch.inf)
        start = row = 0
        for size, number in batch.groups:
            while number:
                take = min(number, max(1, _SCORE_BLOCK // size))
                rows = batch.rows[row : row + take * size]
                documents = batch.documents[start : start + take]
                block = DocumentBatch(documents, rows, [(size, take)])
                scores[:, documents] = self.router.scores(self.chunks[torch.from_numpy(rows)], block, *states)
                start, row, number = start + take, row + take * size, number - take
        return scores

    def _dropped(self, states: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Question states without some tokens and entries; every question keeps at least one token."""
        keep = torch.from_numpy(self.random.random(len(states)) >= self.config.token_dropout)
        for part in keep.split(lengths):
            part[0] |= ~part.any()
        lengths = [int(part.sum()) for part in keep.split(lengths)]
        return F.dropout(states[keep], self.config.state_dropout), lengths

    def _question_states(self, questions: np.ndarray) -> tuple[torch.Tensor, list[int]]:
        offsets = self.features.question_offsets
        lengths = (offsets[questions + 1] - offsets[questions]).tolist()
        return torch.cat([self.tokens[offsets[index] : offsets[index + 1]] for index in questions]), lengths

    def _whiten(self, states: np.ndarray) -> torch.Tensor:
        """Whitened copy in bfloat16, built in portions."""
        out = torch.empty(states.shape, dtype=torch.bfloat16)
        for start in range(0, len(states), 16_384):
            portion = torch.from_numpy(np.asarray(states[start : start + 16_384], dtype=np.float32))
            out[start : start + len(portion)] = portion @ self.router.white.T
        return out


def _schedule(step: int, steps: int) -> float:
    warm_up = min(20, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
