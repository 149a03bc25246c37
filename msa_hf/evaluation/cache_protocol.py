"""How a cache is judged: the first part of a text goes through it, the rest is teacher-forced in blocks.

B batch, G key/value heads, T tokens, D head dim, V vocabulary. This file, `held_bytes` and `decode_speed`
import nothing but torch, because the peers' processes run them, too, without msa_hf (`cache_peer_program`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PREFILL, DECODED, BLOCK = 1024, 512, 32


@dataclass(frozen=True)
class Divergence:
    """Per decoded position [N]: KL to the dense model, NLL, the dense model's NLL, equal first tokens."""

    kl: list[float]
    nll: list[float]
    dense_nll: list[float]
    agrees: list[float]


@torch.inference_mode()
def teacher_force(
    model: Any, cache: Any, ids: Sequence[int], prefill: int = PREFILL, block: int = BLOCK
) -> Iterator[torch.Tensor]:
    """Logits [block, V] of every block after the prefill; `ids` ends with one more token, the last target."""
    tokens = torch.tensor([list(ids)], device=model.device)
    model(tokens[:, :prefill], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for start in range(prefill, tokens.shape[1] - 1, block):
        stop = min(start + block, tokens.shape[1] - 1)
        yield model(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits[0]


@torch.inference_mode()
def diverge(
    logits: Iterator[torch.Tensor], dense: torch.Tensor, targets: Sequence[int], device: Any = "cpu"
) -> Divergence:
    """Compares blocks of logits with `dense` [N, V] over the same positions, in float64.

    Raises FloatingPointError where a cache gives logits that are not finite.
    """
    kl, nll, dense_nll, agrees = [], [], [], []
    start = 0
    for block in logits:
        stop = start + len(block)
        if not bool(torch.isfinite(block).all()):
            raise FloatingPointError(f"logits of decoded tokens {start} to {stop} are not finite")
        ours = block.double().log_softmax(-1)
        theirs = dense[start:stop].to(block.device).double().log_softmax(-1)
        wanted = torch.tensor(list(targets[start:stop]), device=block.device)[:, None]
        kl += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
        nll += (-ours.gather(1, wanted)[:, 0]).tolist()
        dense_nll += (-theirs.gather(1, wanted)[:, 0]).tolist()
        agrees += (ours.argmax(-1) == theirs.argmax(-1)).double().tolist()
        start = stop
    if start != len(dense):
        raise ValueError(f"{start} positions of logits against {len(dense)} of the dense model")
    return Divergence(kl, nll, dense_nll, agrees)


def fill(cache: Any, states: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, stop: int) -> None:
    """Hands tokens start..stop of per-layer keys and values [B, G, T, D] to a cache, as a forward would."""
    for layer, (keys, values) in enumerate(states):
        cache.update(keys[:, :, start:stop].contiguous(), values[:, :, start:stop].contiguous(), layer)


def marginal_bits(
    make: Callable[[], Any],
    states: Sequence[tuple[torch.Tensor, torch.Tensor]],
    held: Callable[[Any], int],
    prefill: int = PREFILL,
    block: int = BLOCK,
) -> float:
    """Bits that a further key or value element costs a cache, from the tensors held at two lengths.

    `states` are dense keys and values of prefill + N tokens; all but the first half of the prefill comes in
    blocks, because a slice of a large prefill may keep all of it alive for a while. What does not grow with
    the text (recent window, sinks, rotations) cancels out if N is a multiple of the lengths at which the
    caches flush (128 here).
    """
    tokens, half = states[0][0].shape[2], prefill // 2
    cache = make()
    fill(cache, states, 0, half)
    for start in range(half, prefill, block):
        fill(cache, states, start, min(start + block, prefill))
    before = held(cache)
    for start in range(prefill, tokens, block):
        fill(cache, states, start, min(start + block, tokens))
    elements = sum(2 * keys[:, :, prefill:].numel() for keys, _ in states)
    return 8 * (held(cache) - before) / elements
