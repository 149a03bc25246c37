"""Router training on a frozen backbone: encode once, train each layer, weigh the layers, save an adapter.

With a frozen backbone the layers' auxiliary losses share no parameter, so each layer is trained by itself and
only one layer's states are in memory.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .adapter import FEATURES_FOLDER, router_weights, save_router_adapter
from .features import encode_features
from .layer_router import LayerRouter
from .layer_training import LayerTrainer, RouterTrainingConfig, TrainingQuestions
from .pairs import RouterPair
from .recall import consensus_weights, document_ranks, recall_figures

logger = logging.get_logger(__name__)


@dataclass
class RouterTrainingResult:
    """Figures (`recall.recall_figures`) on the held-out questions by router layer, and of their consensus."""

    layers: dict[int, dict[str, float]]
    consensus: dict[str, float]
    consensus_weights: list[float]
    seconds: float


def train_router(
    model,
    tokenizer,
    pairs: list[RouterPair],
    config: RouterTrainingConfig,
    output_dir: str | Path,
    features_dir: str | Path | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> RouterTrainingResult:
    """Trains all routers of `model` in place and saves them as a PEFT adapter (see `adapter`).

    Args:
        model: `MSAForCausalLM`; its `router_layers`, `router_chunk_size`, reductions and normalisation
            are what is trained for. Its backbone is not changed.
        output_dir: receives the adapter, `training.jsonl` (a line per evaluation) and `training.json`
            (settings, figures).
        features_dir: where the backbone's states are kept for later runs; `output_dir`/features by default.
        batch_tokens: padded tokens per batch while encoding.

    Raises:
        ValueError: bad settings, or too few pairs to train and hold out questions.
    """
    started, output_dir = time.perf_counter(), Path(output_dir)
    torch.manual_seed(config.seed)
    data = _index(pairs, config)
    output_dir.mkdir(parents=True, exist_ok=True)
    features = encode_features(
        model,
        tokenizer,
        data.questions,
        data.documents,
        features_dir or output_dir / FEATURES_FOLDER,
        batch_tokens,
        progress,
    )
    encoded = time.perf_counter() - started
    figures, scores = {}, []
    with open(output_dir / "training.jsonl", "w", encoding="utf-8") as log:

        def record(**fields) -> None:
            log.write(json.dumps(fields) + "\n")
            log.flush()
            logger.info(f"{fields}")

        record(
            questions=len(data.questions), documents=len(data.documents), encoding_seconds=round(encoded, 1)
        )
        bar = logging.tqdm(
            total=config.steps * len(features.chunks), desc="training routers", disable=not progress
        )
        with bar:
            for layer in features.chunks:
                trainer = LayerTrainer(model.config, layer, features, data, config)
                figures[layer], layer_scores = trainer.run(record, bar.update)
                scores.append(layer_scores)
                _write_weights(model, layer, trainer.router)
        positives = [data.positives[index] for index in data.held_out]
        weights = (
            consensus_weights(scores, positives) if config.consensus == "learned" else [1.0] * len(scores)
        )
        together = recall_figures(document_ranks(scores, weights), positives)
        record(consensus_weights=weights, **together)
    model.config.consensus_weights = weights
    model.config.routers_trained = True
    save_router_adapter(model, output_dir, getattr(torch, config.dtype))
    result = RouterTrainingResult(figures, together, weights, round(time.perf_counter() - started, 1))
    (output_dir / "training.json").write_text(
        json.dumps({"config": asdict(config), "result": asdict(result)}, indent=2) + "\n", encoding="utf-8"
    )
    return result


def _index(pairs: list[RouterPair], config: RouterTrainingConfig) -> TrainingQuestions:
    held_out = min(config.held_out, len(pairs) // 4)
    if not held_out or len(pairs) - held_out < 2:
        raise ValueError(
            f"pairs must hold at least 4 questions to train on some and hold out others; got {len(pairs)}"
        )
    ids: dict[str, int] = {}

    def number(texts) -> np.ndarray:
        return np.array([ids.setdefault(text, len(ids)) for text in texts], dtype=np.int64)

    positives = [number(pair.positives) for pair in pairs]
    negatives = [number(pair.negatives) for pair in pairs]
    if len(ids) < 2:
        raise ValueError("pairs must name at least two different documents")
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    return TrainingQuestions(
        questions=[pair.question for pair in pairs],
        documents=list(ids),
        positives=positives,
        negatives=negatives,
        train=np.sort(order[held_out:]),
        held_out=np.sort(order[:held_out]),
    )


@torch.no_grad()
def _write_weights(model, layer: int, router: LayerRouter) -> None:
    prefix, weights = f"model.layers.{layer}.self_attn.", router_weights(model)
    for name, value in zip(("router_q_proj", "router_k_proj"), router.weights()):
        weights[f"{prefix}{name}.0.weight"].copy_(value)
