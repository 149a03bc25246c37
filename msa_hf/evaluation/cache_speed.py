"""Decode speed of this package's caches per context, and the bytes that they hold at any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msa_hf.evaluation.cache_protocol import fill
from msa_hf.evaluation.cache_systems import CacheSystem, using_attention
from msa_hf.evaluation.decode_speed import SpeedRatio, decode_speed, dense_states
from msa_hf.evaluation.held_bytes import held_bytes
from msa_hf.modeling.ops import use_compiled

CONTEXTS = (2048, 8192)
HELD_TOKENS = (2048, 32768)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one cache with `tokens` tokens: its own report beside what was counted."""

    name: str
    tokens: int
    reported: int | None  # None: the cache has no report
    counted: int  # every reachable tensor, each storage once
    bfloat16: int  # the same tokens in a dense bfloat16 cache
    parts: dict[str, float]  # the report in full


def measure_speed(
    model: Any,
    systems: Sequence[CacheSystem],
    ids: Sequence[int],
    contexts: Sequence[int] = CONTEXTS,
    groups: int = 24,
    steps: int = 8,
) -> dict[str, list[SpeedRatio]]:
    """Per system its ratios to DynamicCache; `ids` reach beyond the longest context (`speed_tokens`).

    On a CPU our caches are read by compiled products (`ops.use_compiled`), as they are by default after some
    hundred steps; the first group, which is not timed, compiles them.
    """
    states = dense_states(model, ids, max(contexts))
    use_compiled(True)
    try:
        return {
            system.name: [
                decode_speed(
                    model,
                    lambda system=system: system.make(model.config),
                    ids,
                    states,
                    context=context,
                    attention=system.attention,
                    groups=groups,
                    steps=steps,
                )
                for context in contexts
            ]
            for system in systems
        }
    finally:
        use_compiled(None)


def speed_tokens(contexts: Sequence[int], groups: int = 24, steps: int = 8) -> int:
    """Tokens that a text must have to be decoded in all of these groups after the longest context."""
    return max(contexts) + (groups + 1) * steps + 2


@torch.inference_mode()
def measure_bytes(
    model: Any,
    systems: Sequence[CacheSystem],
    lengths: Sequence[int] = HELD_TOKENS,
    chunk: int = 1024,
    seed: int = 0,
) -> list[CacheBytes]:
    """Fills caches with random bfloat16 keys and values of the model's shapes, chunk by chunk, and counts."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = list(model.parameters())
    results = []
    for system in systems:
        with using_attention(model, system.attention):
            cache, filled = system.make(model.config), 0
            draw = torch.Generator().manual_seed(seed)
            for length in sorted(lengths):
                while filled < length:
                    size = min(chunk, length - filled)
                    block = torch.randn(1, heads, size, dim, generator=draw).bfloat16().to(model.device)
                    fill(cache, [(block, block)] * config.num_hidden_layers, 0, size)
                    filled += size
                results.append(_count(system.name, cache, length, weights, config, heads * dim))
    return results


def _count(
    name: str, cache: Any, tokens: int, weights: Sequence[torch.Tensor], config: Any, width: int
) -> CacheBytes:
    report = cache.report().to_dict() if hasattr(cache, "report") else {}
    return CacheBytes(
        name=name,
        tokens=tokens,
        reported=report.get("total"),
        counted=held_bytes(cache, weights),
        bfloat16=2 * 2 * tokens * width * config.num_hidden_layers,
        parts=report,
    )
