"""What a quantised cache does to a model's predictions: KL, likelihood and first tokens against dense.

1,024 tokens of every text go through the cache, the next 512 are teacher-forced in blocks of 32
(`cache_protocol`). Intervals are those of texts drawn anew, since positions of one text go together. With
length: 4,000 tokens decoded in the same blocks, the last 256 beside the first, and beside a cache that took
everything up to there in one piece, which tells what decoding itself adds.
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


@dataclass(frozen=True)
class LengthQuality:
    """KL over the first and last decoded tokens of long texts, and of the last after one single prefill."""

    name: str
    tokens: int
    edge: int
    first: Estimate
    last: Estimate
    last_in_one_piece: Estimate
    growth: Estimate  # last - last_in_one_piece, paired over texts


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


def measure_length(
    model: Any,
    system: CacheSystem,
    rows: Sequence[Sequence[int]],
    protocol: Protocol = Protocol(decoded=4000),
    edge: int = 256,
) -> LengthQuality:
    """KL at both ends of a long decoding. Raises ValueError if `edge` is no multiple of the block."""
    if edge % protocol.block or 2 * edge > protocol.decoded:
        raise ValueError(f"edge must be a multiple of {protocol.block} within half of the tokens; got {edge}")
    whole = Protocol(protocol.length - 1 - edge, edge, protocol.block)
    first, last, fresh = [], [], []
    for ids in rows:
        dense = _edges(model, DynamicCache(config=model.config), ids, protocol, edge)
        with using_attention(model, system.attention):
            decoded = _edges(model, system.make(model.config), ids, protocol, edge)
            cache = system.make(model.config)
            once = list(teacher_force(model, cache, ids, whole.prefill, whole.block))
        start = protocol.prefill + 1
        for kept, logits, reference, targets in (
            (first, decoded[0], dense[0], ids[start : start + edge]),
            (last, decoded[1], dense[1], ids[-edge:]),
            (fresh, torch.cat(once), dense[1], ids[-edge:]),
        ):
            kept.append(float(np.mean(diverge(iter([logits]), reference, targets).kl)))
    return LengthQuality(
        name=system.name,
        tokens=protocol.decoded,
        edge=edge,
        first=bootstrap(first),
        last=bootstrap(last),
        last_in_one_piece=bootstrap(fresh),
        growth=paired_difference(last, fresh),
    )


def _edges(
    model: Any, cache: Any, ids: Sequence[int], protocol: Protocol, edge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [edge, V] of the first and the last decoded positions; nothing else is kept."""
    blocks = edge // protocol.block
    total = -(-protocol.decoded // protocol.block)
    first, last = [], []
    for number, logits in enumerate(teacher_force(model, cache, ids, protocol.prefill, protocol.block)):
        if number < blocks:
            first.append(logits)
        if number >= total - blocks:
            last.append(logits)
    return torch.cat(first), torch.cat(last)
