"""Transforms of all heads of a model, and the price of every coding of them.

Axis letters: G key/value heads, n tokens, D head dim, C codings.
"""

import torch

from .bit_allocation import Choices, Name, Parts, coding_costs, codings
from .cache_settings import CacheSettings
from .calibration_plan import CalibrationPlan
from .fitted_transforms import FittedTransforms
from .key_value_gradients import HeadSamples
from .transform_fitting import fit_transform

Matrices = dict[Name, torch.Tensor]  # [G, D, D] float64


class CodingPrices:
    """Transforms, and what every coding of every head costs on texts that they were not fitted to.

    Args:
        samples: keys, values and gradients of all segments. folds: two halves of the segments.
        transforms: whether any are fitted; without them channels are priced as a cache sorts them.

    Attributes:
        costs: [G, C] nats per token for each layer and kind, over the codings in `choices`.
        matrices: the fits, [G, D, D] float64: to either half, and to all segments.
    """

    def __init__(
        self,
        samples: dict[Name, HeadSamples],
        folds: tuple[list[int], list[int]],
        plan: CalibrationPlan,
        settings: CacheSettings,
        transforms: bool,
    ):
        self.samples, self.folds, self.plan, self.transforms = samples, folds, plan, transforms
        self.choices = {name: codings(own.vectors.shape[-1]) for name, own in samples.items()}
        self.matrices: list[Matrices] = [{}, {}, {}]
        self.costs: dict[Name, torch.Tensor] = {}
        tokens = plan.context - settings.sinks - settings.window_at(plan.context)
        share = max(1, tokens) / plan.continuation
        for name, own in samples.items():
            held_out = []
            for fold, numbers in enumerate((*folds, sorted(folds[0] + folds[1]))):
                self.matrices[fold][name] = self._fit(name[0], *own.of(numbers))
                if fold < 2:
                    other = own.of(folds[1 - fold])
                    held_out.append(coding_costs(*other, self.matrices[fold][name], self.choices[name]))
            self.costs[name] = share * sum(held_out) / 2

    def _fit(self, kind: str, vectors: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        if self.transforms:
            shrinkage = self.plan.key_shrinkage if kind == "keys" else self.plan.value_shrinkage
            return fit_transform(vectors, gradients, shrinkage)
        # Without transforms a cache sorts the channels by their energy.
        order = vectors.double().square().mean(dim=1).argsort(dim=-1, descending=True)
        return torch.nn.functional.one_hot(order, vectors.shape[-1]).double().mT

    def priced(self, chosen: Choices) -> dict[Name, float]:
        """The predicted KL of each layer and kind."""
        return {
            name: sum(
                float(self.costs[name][head, self.choices[name].index(parts)])
                for head, parts in enumerate(heads)
            )
            for name, heads in chosen.items()
        }

    def fitted(self, chosen: Choices, fit: int = 2) -> FittedTransforms | None:
        """The matrices of one fit, [G, D, D] float16, the coordinates of every part of a typical size."""
        if not self.transforms:
            return None
        found = {}
        for (kind, layer), matrix in self.matrices[fit].items():
            vectors = self.samples[kind, layer].vectors.float().transpose(0, 1).flatten(1, 2)
            scaled = [
                _typical_sizes(own, vectors[head], parts)
                for head, (own, parts) in enumerate(zip(matrix, chosen[kind, layer]))
            ]
            found[f"layers.{layer}.{kind}"] = torch.stack(scaled).half()
        return FittedTransforms(found)


def _typical_sizes(matrix: torch.Tensor, vectors: torch.Tensor, parts: Parts) -> torch.Tensor:
    """A matrix [D, D] whose parts give coordinates as large as those of the vectors [n, D].

    Scales of 8 bits are finest there (`scale_table`). Sizes change by powers of 2.
    """
    typical = vectors.square().mean(dim=-1).sqrt().median()
    scaled, start = matrix.clone(), 0
    for width, _ in parts:
        own = slice(start, start + width)
        size = (vectors @ matrix[:, own].float()).square().mean(dim=-1).sqrt().median()
        ratio = (size / typical.clamp_min(1e-30)).clamp(1e-30, 1e30) if typical > 0 else torch.ones(())
        scaled[:, own] /= ratio.double().log2().round().exp2()
        start += width
    return scaled
