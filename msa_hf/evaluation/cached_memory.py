"""Memories and embeddings of a benchmark, kept on disk so that a second run starts at once.

A cache entry is named by what it is made from (model fingerprint, documents), so it is never stale, and
appears under its name only when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from msa_hf.evaluation.hotpotqa import document_digest
from msa_hf.modeling.errors import MemoryFormatError
from msa_hf.packages import cache_folder

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """The folder of evaluations beside the fetched packages."""
    return cache_folder() / "evaluation"


def benchmark_memory(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    cache_dir: str | Path | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Any:
    """The MemoryBank of `documents`, encoded by `model` or read from an earlier run's folder."""
    from msa_hf.modeling.memory_bank import MemoryBank

    name = _name(
        "bank", json.dumps(model.fingerprint(), sort_keys=True, default=str), document_digest(documents)
    )
    folder = (Path(cache_dir) if cache_dir else default_cache()) / name
    if folder.is_dir():
        try:
            return MemoryBank.from_pretrained(folder, model=model)
        except MemoryFormatError as error:
            logger.warning("Cached memory %s is damaged and will be encoded again: %s", folder, error)
            shutil.rmtree(folder)
    # An interrupted encoding resumes from its finished batches.
    partial = folder.with_suffix(".partial")
    memory = model.encode_memory(
        list(documents),
        tokenizer,
        batch_tokens=batch_tokens,
        progress=progress,
        resume_dir=partial / "batches",
    )
    _publish(folder, memory.save_pretrained)
    shutil.rmtree(partial, ignore_errors=True)
    return memory


def cached_embeddings(
    label: str,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], torch.Tensor],
    cache_dir: str | Path | None = None,
) -> torch.Tensor:
    """`encode(texts)` [N, E], or what an earlier run kept of it under the same label and texts."""
    folder = (Path(cache_dir) if cache_dir else default_cache()) / _name(
        "vectors", label, document_digest(texts)
    )
    file = folder / "vectors.safetensors"
    if file.is_file():
        return load_file(file)["vectors"]
    vectors = encode(texts).contiguous()
    _publish(folder, lambda target: save_file({"vectors": vectors}, Path(target) / file.name))
    return vectors


def _name(kind: str, *parts: str) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def _publish(folder: Path, write: Callable[[str], Any]) -> None:
    """Writes into a sibling folder, then renames: `folder` is complete or absent."""
    work = folder.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    try:
        write(str(work))
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
