"""Routers together with LoRA on the attention below the last router layer; the backbone runs with gradients.

Every step encodes its questions and documents, which is far slower than training on stored states: start from
trained routers.
Axis letters: B questions, T tokens, N documents, R chunks, E hidden size.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..modeling.memory_bank import DenseVectors, chunk_counts
from ..modeling.memory_encoding import pad_rows, tokenize_documents
from ..modeling.ops import document_scores, pool_chunks
from .adapter import router_peft_config, write_settings
from .layer_router import contrastive_loss
from .pairs import RouterPair

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LoraTrainingConfig:
    """How attention and routers are trained together.

    Attributes:
        rank: of LoRA on q, k, v and o of every layer below the last router layer.
        steps: optimiser steps. batch_size: questions per step.
        negatives: documents per question and step, drawn from its known negatives; the others' count, too.
        learning_rate: peak, of AdamW on LoRA; the routers' is a tenth of it.
        temperature: tau of the contrastive loss.
        max_document_tokens: documents are cut there.
        log_every: steps between two lines of the log. seed: of batches and LoRA's initial weights.
    """

    rank: int = 8
    steps: int = 200
    batch_size: int = 8
    negatives: int = 2
    learning_rate: float = 2e-4
    temperature: float = 0.02
    max_document_tokens: int = 256
    log_every: int = 20
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "steps", "batch_size", "max_document_tokens", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.negatives < 0:
            raise ValueError(f"negatives must be at least 0; got {self.negatives}")


def train_lora(
    model,
    tokenizer,
    pairs: list[RouterPair],
    config: LoraTrainingConfig,
    output_dir: str | Path,
    progress: bool = False,
):
    """Trains LoRA and routers on `pairs` and saves both as one PEFT adapter with `lora.jsonl`, the log.

    Args:
        model: `MSAForCausalLM` with trained routers, float32; PEFT's layers are put into it.

    Returns:
        The `PeftModel`; its `merge_and_unload()` gives a plain `MSAForCausalLM`.
    """
    from peft import get_peft_model

    if len(pairs) < config.batch_size:
        raise ValueError(
            f"pairs must hold at least batch_size={config.batch_size} questions; got {len(pairs)}"
        )
    output_dir, started = Path(output_dir), time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    wrapped = get_peft_model(model, router_peft_config(model, lora_rank=config.rank))
    wrapped.train()
    routers = [p for name, p in wrapped.named_parameters() if p.requires_grad and "router_" in name]
    lora = [p for name, p in wrapped.named_parameters() if p.requires_grad and "router_" not in name]
    groups = [{"params": lora, "scale": 1.0}, {"params": routers, "scale": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    random, queue, losses = np.random.default_rng(config.seed), [], []
    with open(output_dir / "lora.jsonl", "w", encoding="utf-8") as log:
        log.write(json.dumps(asdict(config)) + "\n")
        for step in logging.tqdm(range(config.steps), desc="training LoRA", disable=not progress):
            if len(queue) < config.batch_size:
                queue = random.permutation(len(pairs)).tolist()
            batch, queue = [pairs[i] for i in queue[: config.batch_size]], queue[config.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * group["scale"] * (1 - step / config.steps)
            loss = batch_loss(model, tokenizer, batch, config, random)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                seconds = round(time.perf_counter() - started, 1)
                line = {"step": step + 1, "loss": round(float(np.mean(losses)), 4), "seconds": seconds}
                losses.clear()
                log.write(json.dumps(line) + "\n")
                log.flush()
                logger.info(f"{line}")
    wrapped.eval()
    model.config.routers_trained = True
    wrapped.save_pretrained(output_dir)
    write_settings(model.config, output_dir)
    return wrapped


def batch_loss(
    model, tokenizer, batch: list[RouterPair], config: LoraTrainingConfig, random: np.random.Generator
) -> torch.Tensor:
    """Contrastive loss of a batch's questions over the documents of all of them, mean over router layers."""
    documents: dict[str, int] = {}
    for pair in batch:
        drawn = random.permutation(len(pair.negatives))[: config.negatives]
        for text in (*pair.positives, *(pair.negatives[i] for i in drawn)):
            documents.setdefault(text, len(documents))
    positives = torch.zeros(len(batch), len(documents), dtype=torch.bool)
    for row, pair in zip(positives, batch):
        row[[documents[text] for text in pair.positives]] = True
    losses = [
        contrastive_loss(scores, positives.to(scores.device), config.temperature)
        for scores in routing_scores(
            model, tokenizer, [p.question for p in batch], list(documents), config
        ).values()
    ]
    return torch.stack(losses).mean()


def routing_scores(
    model, tokenizer, questions: list[str], documents: list[str], config: LoraTrainingConfig
) -> dict[int, torch.Tensor]:
    """[B, N] document scores by router layer, with gradients; every question and document is alone."""
    settings, scores = model.config, {}
    keys: dict[int, torch.Tensor] = {}
    rows = tokenize_documents(documents, tokenizer, settings.prompt_format)
    ids, lengths = pad_rows([row[: config.max_document_tokens] for row in rows], model.device)
    counts = chunk_counts(lengths, settings.router_chunk_size)

    def record_keys(layer, hidden, *_):
        pooled = pool_chunks(hidden, lengths, settings.router_chunk_size)
        keys[layer] = model.model.layers[layer].self_attn.router_keys(pooled)

    def record_scores(layer, hidden, *_):
        queries = model.model.layers[layer].self_attn.router_queries(hidden, None)
        scores[layer] = document_scores(
            queries,
            mask,
            DenseVectors(keys[layer]),
            counts,
            head_reduction=settings.head_reduction,
            query_reduction=settings.query_reduction,
            chunk_reduction=settings.chunk_reduction,
        )

    model.model.encode(ids, record_keys)
    ids, lengths_of_questions = pad_rows(tokenize_documents(questions, tokenizer, "chat"), model.device)
    mask = torch.arange(ids.shape[1]) < lengths_of_questions[:, None]
    model.model.encode(ids, record_scores)
    return scores
