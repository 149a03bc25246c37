"""Decode speed of a cache as a ratio to DynamicCache, and the memory that one step asks for.

Both caches hold the same context and take turns in groups of single-token steps within one process, so that
whatever else the machine does meets both. Only torch and Transformers are imported (see `cache_protocol`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

_ALLOCATION = "[memory]"
_SECOND_STEP = "second step"


@dataclass(frozen=True)
class SpeedRatio:
    """Decode speed of a system over that of DynamicCache, by turns of `steps` tokens."""

    context: int
    median: float  # of the ratios of neighbouring groups
    low: float  # the slowest and the fastest of them
    high: float
    overall: float  # ratio of all seconds, flushes of a recent window included
    groups: int
    steps: int
    dense_ms: float  # median milliseconds per token
    system_ms: float
    kl: float  # mean KL to the dense logits over the first timed group: the proof that it still works
    step_bytes: int  # most memory that one step held at a time beyond what it found
    dense_step_bytes: int
    layer_bytes: int  # dense keys and values of one layer
    cache_bytes: int  # ... of all layers


def decode_speed(
    model: Any,
    make: Callable[[], Any],
    ids: Sequence[int],
    states: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    context: int,
    attention: str | None = None,
    groups: int = 24,
    steps: int = 8,
    largest_kl: float = 5.0,
) -> SpeedRatio:
    """Times `make()` against DynamicCache after `context` tokens.

    Args:
        model: causal language model; left with its own attention.
        ids: token ids of a text of context + (groups + 1) * steps + 2 tokens at least.
        states: dense keys and values [B, G, T, D] per layer of its first `context` tokens.
        attention: attention implementation of the system, None: the model's own.

    Raises RuntimeError if the system's logits are not finite or nowhere near the dense ones.
    """
    own = model.config._attn_implementation
    sides = [(DynamicCache(config=model.config), own), (make(), attention or own)]
    for cache, _ in sides:
        _fill(cache, states, context)
    place, seconds, kl = context, [[], []], 0.0
    for group in range(-1, groups):
        tokens = torch.tensor([list(ids[place : place + steps])], device=model.device)
        outcome = [_timed_steps(model, cache, tokens, name) for cache, name in sides]
        if group < 0:
            kl = _divergence(outcome[0][1], outcome[1][1])
            if not kl <= largest_kl:
                raise RuntimeError(f"logits are wrong (KL {kl:.2f} to the dense cache): nothing is timed")
        else:
            for side, (taken, _) in zip(seconds, outcome):
                side.append(taken)
        place += steps
    peaks = [step_bytes(model, cache, ids[place : place + 2], name) for cache, name in sides]
    model.set_attn_implementation(own)
    ratios = [dense / system for dense, system in zip(*seconds)]
    layer = sum(2 * keys[:, :, :context].numel() * keys.element_size() for keys, _ in states) // len(states)
    return SpeedRatio(
        context=context,
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        overall=sum(seconds[0]) / sum(seconds[1]),
        groups=groups,
        steps=steps,
        dense_ms=1000 * statistics.median(seconds[0]) / steps,
        system_ms=1000 * statistics.median(seconds[1]) / steps,
        kl=kl,
        step_bytes=peaks[1],
        dense_step_bytes=peaks[0],
        layer_bytes=layer,
        cache_bytes=layer * len(states),
    )


@torch.inference_mode()
def dense_states(model: Any, ids: Sequence[int], length: int, chunk: int = 1024) -> list[tuple]:
    """Dense keys and values [1, G, length, D] of every layer, encoded in chunks."""
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([list(ids[:length])], device=model.device)
    for start in range(0, length, chunk):
        model(tokens[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.inference_mode()
def step_bytes(model: Any, cache: Any, ids: Sequence[int], attention: str | None = None) -> int:
    """Most bytes that a decode step held beyond those before it, from the allocator's own record.

    `ids` are two tokens. The second step counts: what it frees of the cache was allocated within the record.
    """
    model.set_attn_implementation(attention or model.config._attn_implementation)
    tokens = torch.tensor([list(ids)], device=model.device)
    model_step = partial(model, past_key_values=cache, use_cache=True)
    if tokens.is_cuda:
        model_step(tokens[:, :1])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model_step(tokens[:, 1:])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        model_step(tokens[:, :1])
        with torch.profiler.record_function(_SECOND_STEP):
            model_step(tokens[:, 1:])
    events = list(profile.profiler.kineto_results.events())
    begin = next(event.start_ns() for event in events if event.name() == _SECOND_STEP)
    held = peak = 0
    for event in sorted((e for e in events if e.name() == _ALLOCATION), key=lambda event: event.start_ns()):
        if event.start_ns() >= begin:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@torch.inference_mode()
def _timed_steps(model: Any, cache: Any, tokens: torch.Tensor, attention: str) -> tuple[float, torch.Tensor]:
    """Seconds of feeding tokens [1, N] one by one, and their logits [N, V]."""
    model.set_attn_implementation(attention)
    rows = []
    if tokens.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(tokens.shape[1]):
        rows.append(model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True).logits[0, -1])
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.stack(rows)


def _divergence(dense: torch.Tensor, system: torch.Tensor) -> float:
    theirs, ours = dense.double().log_softmax(-1), system.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@torch.inference_mode()
def _fill(cache: Any, states: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
    for layer, (keys, values) in enumerate(states):
        cache.update(keys[:, :, :length].contiguous(), values[:, :, :length].contiguous(), layer)
