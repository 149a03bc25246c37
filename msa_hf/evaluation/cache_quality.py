"""What a quantised cache does to a model's predictions: KL, likelihood and first tokens against dense.

1,024 tokens of every text go through the cache, the next 512 are teacher-forced in blocks of 32
(`cache_protocol`). Intervals are those of texts drawn anew, since positions of one text go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from msa_hf.evaluation.cache_protocol import (
    BLOCK,
    DECODED,
    PREFILL,
    Divergence,
    diverge,
    marginal_bits,
    teacher_force,
)
from msa_hf.evaluation.cache_systems import CacheSystem, settled_bytes, using_attention
from msa_hf.evaluation.decode_speed import dense_states
from msa_hf.evaluation.metrics import Estimate, bootstrap, paired_difference


@dataclass(frozen=True)
class Protocol:
    """Tokens prefilled, tokens decoded after them, and tokens of one block."""

    prefill: int = PREFILL
    decoded: int = DECODED
    block: int = BLOCK

    @property
    def length(self) -> int:
        """Tokens that a text must have; the last one is only a target."""
        return self.prefill + self.decoded + 1


@dataclass(frozen=True)
class CacheQuality:
    """One system's figures over the texts; `kl_by_text` holds the means that the intervals come from."""

    name: str
    bits: float  # marginal bits per key or value element, from the tensors held
    kl: Estimate  # nats
    nll_change: Estimate  # nats
    nll_percent: float
    agreement: Estimate  # fraction of positions with the dense model's first token
    kl_by_text: list[float]
    peer: bool = False


def save_dense_logits(
    model: Any, rows: Sequence[Sequence[int]], folder: Path, protocol: Protocol = Protocol()
) -> None:
    """Writes logits [decoded, V] of the dense cache, one file per text, for all systems and peers."""
    for number, ids in enumerate(rows):
        cache = DynamicCache(config=model.config)
        blocks = list(teacher_force(model, cache, ids, protocol.prefill, protocol.block))
        save_file({"logits": torch.cat(blocks).float().cpu()}, folder / f"{number}.safetensors")


def measure_quality(
    model: Any,
    system: CacheSystem,
    rows: Sequence[Sequence[int]],
    folder: Path,
    protocol: Protocol = Protocol(),
) -> list[Divergence]:
    """Divergence of one system on every text, from the dense logits in `folder`."""
    results = []
    with using_attention(model, system.attention):
        for number, ids in enumerate(rows):
            dense = load_file(folder / f"{number}.safetensors")["logits"]
            cache = system.make(model.config)
            logits = teacher_force(model, cache, ids, protocol.prefill, protocol.block)
            results.append(diverge(logits, dense, ids[protocol.prefill + 1 :]))
    return results


def measured_states(model: Any, ids: Sequence[int], protocol: Protocol = Protocol()) -> list[tuple]:
    """The bfloat16 keys and values [1, G, T, D] per layer of a real text that bits are measured with."""
    states = dense_states(model, ids, protocol.length - 1)
    return [(keys.bfloat16(), values.bfloat16()) for keys, values in states]


def measure_bits(
    model: Any, system: CacheSystem, states: Sequence[tuple], protocol: Protocol = Protocol()
) -> float:
    """Marginal bits per element of one system that holds `states`, see `measured_states`."""
    weights = list(model.parameters())
    with using_attention(model, system.attention):
        return marginal_bits(
            lambda: system.make(model.config),
            states,
            lambda cache: settled_bytes(cache, weights),
            protocol.prefill,
            protocol.block,
        )


def summarize_quality(
    name: str, bits: float, results: Sequence[Divergence], peer: bool = False
) -> CacheQuality:
    """Means over texts with their intervals."""
    kl = [float(np.mean(result.kl)) for result in results]
    nll = [float(np.mean(result.nll)) for result in results]
    dense = [float(np.mean(result.dense_nll)) for result in results]
    return CacheQuality(
        name=name,
        bits=bits,
        kl=bootstrap(kl),
        nll_change=paired_difference(nll, dense),
        nll_percent=100 * (float(np.mean(nll)) / float(np.mean(dense)) - 1),
        agreement=bootstrap([float(np.mean(result.agrees)) for result in results]),
        kl_by_text=kl,
        peer=peer,
    )
