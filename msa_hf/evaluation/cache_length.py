"""Whether a quantised cache gets worse the longer it decodes: the same passages decoded first and last.

A text's first decoded tokens and its last ones are other words, and KL depends on the words, too. So the two
change places. The opening passage is decoded right after the tokens that are prefilled, as the text begins,
and last of all, as the text ends when it begins just behind it; the closing passage is decoded last,
as the text ends, and right after those of its tokens that stand just before it. Every passage thus has the
same words before it in both places, and length alone differs:

    as it stands    [ prefill ][ opening ] ............................ [ closing ]
    turned round    [ closing ] ............................ [ prefill ][ opening ]
    short           [ what stands before the closing passage ][ closing ]

What decoding itself adds is told by the closing passage after everything before it in one prefill.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from msa_hf.evaluation.cache_protocol import Divergence, diverge, teacher_force
from msa_hf.evaluation.cache_quality import Protocol
from msa_hf.evaluation.cache_systems import CacheSystem, dense_system, using_attention
from msa_hf.evaluation.metrics import Estimate, bootstrap, paired_difference

logger = logging.getLogger(__name__)

LONG_PROTOCOL = Protocol(decoded=4000)


@dataclass(frozen=True)
class PassageQuality:
    """Some decoded tokens of every text: KL of a system and the dense model's own NLL, in nats."""

    kl: Estimate
    dense_nll: Estimate
    kl_by_text: list[float]
    dense_nll_by_text: list[float]


@dataclass(frozen=True)
class LengthQuality:
    """Both passages of the texts at both ends of a decoding of `tokens` tokens after `prefill` others.

    Differences are paired over texts; `over_first` is what length costs.
    """

    name: str
    tokens: int
    edge: int  # tokens of a passage
    prefill: int
    last: PassageQuality
    first: PassageQuality
    over_first: Estimate  # KL of last - first: the same words
    closing: PassageQuality  # last, the closing passage alone
    closing_in_one_piece: PassageQuality
    over_one_piece: Estimate  # KL of closing - closing_in_one_piece
    opening: PassageQuality  # first, the opening passage alone
    as_it_stands: Estimate  # KL of closing - opening: other words


def measure_length(
    model: Any,
    systems: Sequence[CacheSystem],
    rows: Sequence[Sequence[int]],
    protocol: Protocol = LONG_PROTOCOL,
    edge: int = 256,
) -> list[LengthQuality]:
    """KL at both ends of a long decoding, per system; `rows` are texts of `protocol.length` token ids.

    Raises ValueError unless `edge` and the decoded tokens are multiples of the block and both edges fit.
    """
    if edge % protocol.block or protocol.decoded % protocol.block or 2 * edge > protocol.decoded:
        raise ValueError(
            f"edge and decoded must be multiples of {protocol.block}, edge at most half of decoded; "
            f"got {edge} and {protocol.decoded}"
        )
    texts = []
    for number, ids in enumerate(rows, 1):
        logger.info("text %d of %d", number, len(rows))
        texts.append(compare_places(model, systems, ids, protocol, edge))
    return [
        summarize_length(system.name, results, protocol, edge)
        for system, results in zip(systems, zip(*texts))
    ]


def compare_places(
    model: Any, systems: Sequence[CacheSystem], ids: Sequence[int], protocol: Protocol, edge: int
) -> list[dict[str, Divergence]]:
    """One text: per system, the divergence of each passage in each place."""
    opened = protocol.prefill + edge + 1  # the opening passage and its last target end here
    opening, closing = ids[protocol.prefill + 1 : opened], ids[-edge:]
    turned, short = [*ids[opened:], *ids[:opened]], ids[-(protocol.prefill + edge + 1) :]

    def logits(system: CacheSystem) -> dict[str, torch.Tensor]:
        with using_attention(model, system.attention):
            first, last = _both_edges(model, system, ids, protocol, edge)
            return {
                "opening_first": first,
                "closing_last": last,
                "opening_last": _both_edges(model, system, turned, protocol, edge)[1],
                "closing_first": _last_edge(model, system, short, protocol.block, edge),
                "closing_in_one_piece": _last_edge(model, system, ids, protocol.block, edge),
            }

    dense = logits(dense_system())
    return [
        {
            place: diverge(iter([ours]), dense[place], opening if "opening" in place else closing)
            for place, ours in logits(system).items()
        }
        for system in systems
    ]


def summarize_length(
    name: str, results: Sequence[dict[str, Divergence]], protocol: Protocol, edge: int
) -> LengthQuality:
    """Means over texts and paired differences of what `compare_places` found, with their intervals."""
    last = _passages(results, "opening_last", "closing_last")
    first = _passages(results, "opening_first", "closing_first")
    opening, closing = _passages(results, "opening_first"), _passages(results, "closing_last")
    in_one_piece = _passages(results, "closing_in_one_piece")
    return LengthQuality(
        name=name,
        tokens=protocol.decoded,
        edge=edge,
        prefill=protocol.prefill,
        last=last,
        first=first,
        over_first=paired_difference(last.kl_by_text, first.kl_by_text),
        closing=closing,
        closing_in_one_piece=in_one_piece,
        over_one_piece=paired_difference(closing.kl_by_text, in_one_piece.kl_by_text),
        opening=opening,
        as_it_stands=paired_difference(closing.kl_by_text, opening.kl_by_text),
    )


def _passages(results: Sequence[dict[str, Divergence]], *places: str) -> PassageQuality:
    """Quality over texts; of several places of one text, each counts alike."""

    def by_text(figure: str) -> list[float]:
        return [float(np.mean([getattr(text[place], figure) for place in places])) for text in results]

    kl, dense_nll = by_text("kl"), by_text("dense_nll")
    return PassageQuality(bootstrap(kl), bootstrap(dense_nll), kl, dense_nll)


def _both_edges(
    model: Any, system: CacheSystem, ids: Sequence[int], protocol: Protocol, edge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [edge, V] of the first and the last decoded positions; nothing else is kept."""
    blocks, total = edge // protocol.block, protocol.decoded // protocol.block
    first, last = [], []
    decoded = teacher_force(model, system.make(model.config), ids, protocol.prefill, protocol.block)
    for number, logits in enumerate(decoded):
        if number < blocks:
            first.append(logits)
        if number >= total - blocks:
            last.append(logits)
    return torch.cat(first), torch.cat(last)


def _last_edge(model: Any, system: CacheSystem, ids: Sequence[int], block: int, edge: int) -> torch.Tensor:
    """Logits [edge, V] of the last positions; all tokens before them are prefilled in one piece."""
    cache = system.make(model.config)
    return torch.cat(list(teacher_force(model, cache, ids, len(ids) - 1 - edge, block)))
