"""What coded keys and values do to the next-token distributions of a model, measured as KL in nats.

A context is coded as a TurboQuantCache would, for some layers and kinds only or for all; the tokens after it
are read with what comes out. Axis letters: G key/value heads, T tokens of the context, D head dim, Q tokens
after it, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch

from .cache_settings import CacheSettings
from .fitted_transforms import FittedTransforms
from .key_value_gradients import KINDS, branch, packed_layers, prefill
from .layer_turboquant import TurboQuantLayer

_ROWS = 64  # rows of logits that are compared at once

Coded = dict[tuple[str, int], torch.Tensor]  # (kind, layer) -> decoded states [1, G, T, D]


class ReferenceText:
    """A text whose context is kept densely, with what the model says after it.

    Args:
        ids: token ids, the first `context` of which are the context.
    """

    def __init__(self, model: Any, ids: list[int], context: int):
        tokens = torch.tensor([ids], device=model.device)
        self.model, self.rest = model, tokens[:, context:]
        self.cache = prefill(model, tokens[:, :context])
        self.logits = self._logits({})

    def coded(self, settings: CacheSettings, transforms: FittedTransforms | None) -> Coded:
        """The context's keys and values as a cache with these settings gives them back."""
        found: Coded = {}
        for index in packed_layers(self.cache, settings):
            states = self.cache.layers[index]
            layer = TurboQuantLayer(settings, index, transforms=transforms)
            layer.update(states.keys, states.values)
            view = layer.view()
            found["keys", index], found["values", index] = view.dense_keys(), view.dense_values()
        return found

    def divergence(
        self,
        coded: Coded,
        kinds: Iterable[str] = KINDS,
        layers: Iterable[int] | None = None,
        tokens: int | None = None,
    ) -> float:
        """Mean KL in nats of the first `tokens` after the context, all by default, if these layers and kinds
        are coded."""
        chosen = {
            name: states
            for name, states in coded.items()
            if name[0] in kinds and (layers is None or name[1] in layers)
        }
        logits, total = self._logits(chosen, tokens), 0.0
        for rows in range(0, len(logits), _ROWS):
            own = slice(rows, min(rows + _ROWS, len(logits)))
            dense, ours = (part[own].float().log_softmax(-1) for part in (self.logits, logits))
            total += float((dense.exp() * (dense - ours)).sum(dtype=torch.float64))
        return total / len(logits)

    @torch.no_grad()
    def _logits(self, coded: Coded, tokens: int | None = None) -> torch.Tensor:
        """[Q, V], with some of the context replaced."""
        cache = branch(self.cache)
        for (kind, index), states in coded.items():
            setattr(cache.layers[index], kind, states)
        return self.model(self.rest[:, :tokens], past_key_values=cache, use_cache=True).logits[0]
