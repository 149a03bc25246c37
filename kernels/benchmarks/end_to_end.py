"""Decode speed of a whole model with a TurboQuantCache and with a DynamicCache.

The model is a Llama with random weights; its caches are filled with random keys and values, of which one
layer is encoded and copied for the others. B batch, G key/value heads, T tokens, D head dim.
"""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from timing import Timing
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from msa_hf.modeling.cache_turboquant import TurboQuantCache


@dataclass(frozen=True)
class Model:
    """Sizes of Llama-3.1-8B, or fewer layers of it."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    groups: int = 8
    inner: int = 14336
    vocabulary: int = 128256

    def build(self, device: torch.device, length: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            max_position_embeddings=length,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        return model.eval()


def filled_cache(kind: str, model: LlamaForCausalLM, batch: int, context: int):
    """A cache of `context` random tokens: kind is "dense" or the name of a preset of TurboQuantCache."""
    config, device = model.config, model.device
    cache = DynamicCache(config=config) if kind == "dense" else TurboQuantCache(config, kind)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    generator = torch.Generator(device).manual_seed(1)
    for layer in range(config.num_hidden_layers if kind == "dense" else 1):
        states = [
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)
        ]
        cache.update(*states, layer)
    for layer in range(1, 0 if kind == "dense" else config.num_hidden_layers):
        cache.layers[layer] = copy.deepcopy(cache.layers[0])
        cache.layers[layer].index = layer
    return cache


@torch.inference_mode()
def step_time(
    model: LlamaForCausalLM,
    kind: str,
    batch: int,
    context: int,
    steps: int,
    runs: int,
    limit: float = 30.0,
) -> Timing:
    """Milliseconds of a decode step, the host's work included; see `filled_cache` for `kind`.

    Args:
        steps: of a run; whole blocks of a TurboQuantCache, so that packing has its share.
        runs: how many are timed, behind one that warms up; only one once `limit` seconds are spent.

    Raises RuntimeError if the logits are not finite.
    """
    cache = filled_cache(kind, model, batch, context)
    model.set_attn_implementation("sdpa" if kind == "dense" else TurboQuantCache.attention_implementation)
    times, begin = [], time.perf_counter()
    for run in range(runs + 1):
        tokens = torch.randint(model.config.vocab_size, (batch, steps), device=model.device)
        start = _now(model.device)
        for step in range(steps):
            logits = model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True).logits
        took = _now(model.device) - start
        if not logits.isfinite().all():
            raise RuntimeError(f"logits of the {kind} cache are not finite: nothing was measured")
        if run:
            times.append(1000 * took / steps)
        if times and time.perf_counter() - begin > limit:
            break
    times.sort()
    return Timing(statistics.median(times), times[0], times[-1], graph=False)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
