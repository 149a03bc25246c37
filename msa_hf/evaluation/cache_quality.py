"""What a quantised cache does to a model's predictions: KL, likelihood and first tokens against dense.

1,024 tokens of every text go through the cache, the next 512 are teacher-forced in blocks of 32
(`cache_protocol`). Intervals are those of texts drawn anew, since positions of one text go together.

With length: 4,000 tokens decoded in the same blocks, the last 256 beside the first. Those are other tokens,
and KL depends on the text, too. Two controls therefore take the same last tokens: after a context as short
as the first ones have, which leaves length alone to differ, and after everything up to there in one piece,
which tells what decoding itself adds.
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
from msa_hf.evaluation.cache_systems import CacheSystem, dense_system, settled_bytes, using_attention
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
class EdgeQuality:
    """Some tokens of every long text: KL of a system and the dense model's own NLL, in nats."""

    kl: Estimate
    dense_nll: Estimate
    kl_by_text: list[float]
    dense_nll_by_text: list[float]


@dataclass(frozen=True)
class LengthQuality:
    """The first and the last decoded tokens of long texts, and those last ones in two other contexts."""

    name: str
    tokens: int
    edge: int
    short: int  # tokens of the short context
    first: EdgeQuality
    last: EdgeQuality
    last_after_short: EdgeQuality  # the `short` tokens before them are all that the model is given
    last_in_one_piece: EdgeQuality  # all tokens before them in one prefill
    over_first: Estimate  # KL of last - first, paired over texts, as the two below
    over_short: Estimate
    over_one_piece: Estimate


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
    systems: Sequence[CacheSystem],
    rows: Sequence[Sequence[int]],
    protocol: Protocol = Protocol(decoded=4000),
    edge: int = 256,
) -> list[LengthQuality]:
    """KL at both ends of a long decoding and of its controls, per system.

    Raises ValueError unless `edge` and the decoded tokens are multiples of the block and both edges fit.
    """
    if edge % protocol.block or protocol.decoded % protocol.block or 2 * edge > protocol.decoded:
        raise ValueError(
            f"edge and decoded must be multiples of {protocol.block}, edge at most half of decoded; "
            f"got {edge} and {protocol.decoded}"
        )
    texts = [compare_edges(model, systems, ids, protocol, edge) for ids in rows]
    return [
        summarize_length(system.name, results, protocol, edge)
        for system, results in zip(systems, zip(*texts))
    ]


def compare_edges(
    model: Any, systems: Sequence[CacheSystem], ids: Sequence[int], protocol: Protocol, edge: int
) -> list[dict[str, Divergence]]:
    """One long text: per system, the divergence of each edge that `LengthQuality` names."""
    start, block = protocol.prefill + 1, protocol.block
    first_targets, last_targets = ids[start : start + edge], ids[-edge:]
    nearby = ids[-(start + edge) :]
    first, last = _both_edges(model, dense_system(), ids, protocol, edge)
    after_short = _last_edge(model, dense_system(), nearby, block, edge)
    results = []
    for system in systems:
        ours_first, ours_last = _both_edges(model, system, ids, protocol, edge)
        short = _last_edge(model, system, nearby, block, edge)
        whole = _last_edge(model, system, ids, block, edge)
        results.append(
            {
                "first": diverge(iter([ours_first]), first, first_targets),
                "last": diverge(iter([ours_last]), last, last_targets),
                "last_after_short": diverge(iter([short]), after_short, last_targets),
                "last_in_one_piece": diverge(iter([whole]), last, last_targets),
            }
        )
    return results


def summarize_length(
    name: str, results: Sequence[dict[str, Divergence]], protocol: Protocol, edge: int
) -> LengthQuality:
    """Means over texts and paired differences of what `compare_edges` found, with their intervals."""
    edges = {kind: _edge_quality([text[kind] for text in results]) for kind in results[0]}

    def beyond(kind: str) -> Estimate:
        return paired_difference(edges["last"].kl_by_text, edges[kind].kl_by_text)

    return LengthQuality(
        name=name,
        tokens=protocol.decoded,
        edge=edge,
        short=protocol.prefill,
        **edges,
        over_first=beyond("first"),
        over_short=beyond("last_after_short"),
        over_one_piece=beyond("last_in_one_piece"),
    )


def _edge_quality(results: Sequence[Divergence]) -> EdgeQuality:
    kl = [float(np.mean(result.kl)) for result in results]
    dense = [float(np.mean(result.dense_nll)) for result in results]
    return EdgeQuality(bootstrap(kl), bootstrap(dense), kl, dense)


def _both_edges(
    model: Any, system: CacheSystem, ids: Sequence[int], protocol: Protocol, edge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [edge, V] of the first and the last decoded positions; nothing else is kept."""
    blocks, total = edge // protocol.block, protocol.decoded // protocol.block
    first, last = [], []
    with using_attention(model, system.attention):
        decoded = teacher_force(model, system.make(model.config), ids, protocol.prefill, protocol.block)
        for number, logits in enumerate(decoded):
            if number < blocks:
                first.append(logits)
            if number >= total - blocks:
                last.append(logits)
    return torch.cat(first), torch.cat(last)


def _last_edge(model: Any, system: CacheSystem, ids: Sequence[int], block: int, edge: int) -> torch.Tensor:
    """Logits [edge, V] of the last positions; all tokens before them are prefilled in one piece."""
    with using_attention(model, system.attention):
        return torch.cat(
            list(teacher_force(model, system.make(model.config), ids, len(ids) - 1 - edge, block))
        )
