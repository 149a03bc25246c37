"""What the keys and values of a context are worth to the tokens after it: vectors and gradients of texts.

The gradients are those of random directions g whose covariance is the Fisher matrix of the model's next-token
distributions, so that (dx . g)^2 / 2, on average, is the KL that a change dx of a key or value causes, summed
over the tokens that follow.

Axis letters: N segments of text, S random directions, G key/value heads, n tokens kept, D head dim, Q tokens
after the context, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .cache_settings import CacheSettings

KINDS = ("keys", "values")
_ROWS = 64  # rows of logits that are worked on at once


@dataclass(frozen=True)
class HeadSamples:
    """Keys or values of a layer, vectors [N, G, n, D], with gradients [N, S, G, n, D]: bfloat16, CPU."""

    vectors: torch.Tensor
    gradients: torch.Tensor

    def of(self, segments: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 vectors [G, N * n, D] and gradients [S, G, N * n, D] of some segments."""
        vectors = self.vectors[segments].float().transpose(0, 1).flatten(1, 2)
        return vectors, self.gradients[segments].float().permute(1, 2, 0, 3, 4).flatten(2, 3)


def context_gradients(
    model: Any,
    segments: list[list[int]],
    context: int,
    settings: CacheSettings,
    directions: int = 2,
    stride: int = 2,
    seed: int = 0,
) -> dict[tuple[str, int], HeadSamples]:
    """Samples of every layer that a TurboQuantCache packs, by (kind, layer).

    Args:
        segments: token ids, the first `context` of which are the context.
        settings: sinks and window, whose tokens are left out, and the mean that keys are coded without.
        stride: every how-many-th token is kept.
    """
    found: dict[tuple[str, int], tuple[list, list]] = {}
    generator = torch.Generator().manual_seed(seed)
    kept = slice(settings.sinks, max(settings.sinks + 1, context - settings.window_at(context)), stride)
    with calibrating(model), torch.inference_mode(False):
        for ids in segments:
            tokens = torch.tensor([ids], device=model.device)
            cache = branch(prefill(model, tokens[:, :context]))
            leaves = {}
            for layer in packed_layers(cache, settings):
                for kind in KINDS:
                    leaf = getattr(cache.layers[layer], kind).detach().requires_grad_()
                    setattr(cache.layers[layer], kind, leaf)
                    leaves[kind, layer] = leaf
            with torch.enable_grad():
                logits = model(tokens[:, context:], past_key_values=cache, use_cache=True).logits
            gradients = [
                torch.autograd.grad(
                    logits,
                    list(leaves.values()),
                    fisher_direction(logits.detach(), generator),
                    retain_graph=number < directions - 1,
                )
                for number in range(directions)
            ]
            del logits, cache
            for place, (name, leaf) in enumerate(leaves.items()):
                vectors = leaf.detach().float()
                if name[0] == "keys" and settings.mean_group:
                    vectors = _centred(vectors, settings)
                own = torch.stack([grads[place][0, :, kept] for grads in gradients])
                lists = found.setdefault(name, ([], []))
                lists[0].append(vectors[0, :, kept].bfloat16().cpu())
                lists[1].append(own.bfloat16().cpu())
    return {name: HeadSamples(torch.stack(x), torch.stack(g)) for name, (x, g) in found.items()}


def fisher_direction(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random vectors [..., V] whose covariance is diag(p) - p p', the Fisher matrix of softmax(logits).

    A sampled token minus p has the same covariance, and heavier tails.
    """
    flat = logits.flatten(0, -2)
    direction = torch.empty_like(flat)
    for rows in range(0, flat.shape[0], _ROWS):
        chance = flat[rows : rows + _ROWS].float().softmax(-1)
        noise = torch.randn(chance.shape, generator=generator).to(chance.device) * chance.sqrt()
        direction[rows : rows + _ROWS] = noise - chance * noise.sum(dim=-1, keepdim=True)
    return direction.view_as(logits)


def prefill(model: Any, tokens: torch.Tensor) -> DynamicCache:
    """The dense cache of a context [1, T]."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from here and leaves the given one as it is."""
    other = copy(cache)
    other.layers = [copy(item) if type(item) is DynamicLayer else deepcopy(item) for item in cache.layers]
    return other


def packed_layers(cache: DynamicCache, settings: CacheSettings) -> list[int]:
    """The layers of a dense cache that a TurboQuantCache packs: full attention, not named as dense."""
    dense = {layer % len(cache.layers) for layer in settings.dense_layers}
    return [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and i not in dense]


@contextmanager
def calibrating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its weights without gradients, its attention one that is differentiable
    and knows soft-capping; afterwards as it was."""
    attention, training = model.config._attn_implementation, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    capped = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("sdpa" if model._supports_sdpa and not capped else "eager")
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)
        model.set_attn_implementation(attention)


def _centred(keys: torch.Tensor, settings: CacheSettings) -> torch.Tensor:
    """Keys [B, G, T, D] without the mean of each group of tokens, in which sinks do not count."""
    centred = keys.clone()
    for start in range(0, keys.shape[2], settings.mean_group):
        own = slice(start, start + settings.mean_group)
        counted = keys[:, :, max(start, settings.sinks) : own.stop]
        if counted.shape[2]:
            centred[:, :, own] -= counted.mean(dim=2, keepdim=True)
    return centred
