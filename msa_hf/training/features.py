"""What routers are trained on: one pooled hidden vector per chunk and layer, and the question tokens' states.

Chunk means and the router's linear map commute: a corpus is encoded once, then routers train in minutes.
Axis letters: R chunks of all documents, Q tokens of all questions, E hidden size, N documents.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..modeling.memory_bank import chunk_counts
from ..modeling.memory_encoding import length_batches, pad_rows, tokenize_documents
from ..modeling.ops import pool_chunks

logger = logging.get_logger(__name__)
FORMAT = 1


@dataclass
class RouterFeatures:
    """Frozen states of `documents` and `questions`, memory-mapped from a folder.

    Attributes:
        chunk_offsets: [N + 1] int64; document i owns rows chunk_offsets[i]:chunk_offsets[i + 1] of `chunks`.
        question_offsets: the same for the questions' tokens.
        chunks: by router layer, float16 [R, E]: attention inputs, averaged over `router_chunk_size` tokens.
        tokens: by router layer, float16 [Q, E].
    """

    documents: list[str]
    questions: list[str]
    chunk_offsets: np.ndarray
    question_offsets: np.ndarray
    chunks: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]


def encode_features(
    model,
    tokenizer,
    questions: list[str],
    documents: list[str],
    folder: str | Path,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> RouterFeatures:
    """Encodes questions and documents through `model.model.encode`, or reads what an earlier call left.

    Rows are written straight to disk, so memory stays at one batch. Finished states live in a subfolder named
    after the backbone's fingerprint, the settings and the texts; any change of these encodes anew.

    Args:
        model: `MSAForCausalLM` with router layers; its routers need not be trained.
        questions, documents: non-empty texts, each tokenised as routing and `encode_memory` do.
        folder: where features are kept; 2 * hidden_size bytes per chunk and per question token and layer.

    Raises:
        ValueError: no router layers, coupled routers, or a text without tokens.
    """
    config = model.config
    if not config.router_layers or not config.separate_router:
        raise ValueError(
            "router_layers must name at least one layer and separate_router must be True to train routers; "
            f"got {config.router_layers} and {config.separate_router}"
        )
    target = Path(folder) / _digest(model, questions, documents)
    rows = {
        "questions": _tokens(questions, tokenizer, "chat"),
        "documents": _tokens(documents, tokenizer, config.prompt_format),
    }
    lengths = {name: torch.tensor([len(row) for row in part]) for name, part in rows.items()}
    counts = {
        "questions": lengths["questions"],
        "documents": chunk_counts(lengths["documents"], config.router_chunk_size),
    }
    offsets = {name: np.concatenate([[0], np.cumsum(part.numpy())]) for name, part in counts.items()}
    if not (target / "complete.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        for name, pool_size in (("questions", 1), ("documents", config.router_chunk_size)):
            _encode_rows(model, rows[name], offsets[name], pool_size, target, name, batch_tokens, progress)
        (target / "complete.json").write_text(
            json.dumps({"format": FORMAT, "router_layers": config.router_layers})
        )
    return RouterFeatures(
        documents=documents,
        questions=questions,
        chunk_offsets=offsets["documents"],
        question_offsets=offsets["questions"],
        chunks={layer: _load(target, "documents", layer) for layer in config.router_layers},
        tokens={layer: _load(target, "questions", layer) for layer in config.router_layers},
    )


def _encode_rows(model, rows, offsets, pool_size, target, name, batch_tokens, progress) -> None:
    """Writes {name}-{layer}.npy for every router layer: [offsets[-1], E] float16 in the order of `rows`."""
    shape = (int(offsets[-1]), model.config.hidden_size)
    arrays = {
        layer: np.lib.format.open_memmap(_path(target, name, layer), "w+", np.float16, shape)
        for layer in model.config.router_layers
    }
    lengths = [len(row) for row in rows]
    bar = logging.tqdm(
        total=sum(lengths), unit="tok", unit_scale=True, desc=f"encoding {name}", disable=not progress
    )
    with bar, torch.inference_mode():
        for batch in length_batches(lengths, batch_tokens):
            ids, counts = pad_rows([rows[index] for index in batch], model.device)
            model.model.encode(
                ids, _writer(arrays, counts, pool_size, [slice(*offsets[i : i + 2]) for i in batch])
            )
            bar.update(int(counts.sum()))
    for array in arrays.values():
        array.flush()


def _writer(
    arrays: dict[int, np.ndarray], lengths: torch.Tensor, pool_size: int, spans: list[slice]
) -> Callable:
    """Recorder for `MSAModel.encode` that pools the states of each row and writes them to its span."""

    def record(layer: int, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        pooled = pool_chunks(hidden, lengths, pool_size).to("cpu", torch.float32)
        pieces = pooled.clamp(-6e4, 6e4).half().numpy()
        start = 0
        for span in spans:
            size = span.stop - span.start
            arrays[layer][span] = pieces[start : start + size]
            start += size

    return record


def _tokens(texts: list[str], tokenizer, prompt_format: str) -> list[torch.Tensor]:
    rows = tokenize_documents(texts, tokenizer, prompt_format)
    for text, row in zip(texts, rows):
        if not len(row):
            raise ValueError(f"every question and document must have at least one token; got {text!r}")
    return rows


def _digest(model, questions: Iterable[str], documents: Iterable[str]) -> str:
    config = model.config
    head = [
        FORMAT, model.fingerprint()["backbone"], str(model.dtype), config.router_layers,
        config.router_chunk_size, config.prompt_format,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(head).encode())
    for texts in (questions, documents):
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:24]


def _path(target: Path, name: str, layer: int) -> Path:
    return target / f"{name}-{layer:03d}.npy"


def _load(target: Path, name: str, layer: int) -> np.ndarray:
    return np.load(_path(target, name, layer), mmap_mode="r", allow_pickle=False)
