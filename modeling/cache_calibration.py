"""Calibration of a TurboQuantCache: bits per layer, head and kind, and transforms, for one model.

1. Gradients of texts say what an error of each key and value costs (`key_value_gradients`).
2. A transform is fitted to every head (`transform_fitting`), and every coding of it is priced on texts that
   it was not fitted to (`bit_allocation`).
3. Bits go where they save most. The KL that the model then shows, for a few groups of layers at a time,
   corrects the prices, since errors spread across layers and gather over tokens; bits are given out anew.

Axis letters: G key/value heads, C codings, D head dim.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any

import torch
from transformers import AutoTokenizer

from .bit_allocation import Parts, Unit, allocate, coding_costs, codings, spec, vector_bits
from .cache_settings import CacheSettings
from .calibration_files import Calibration, identity
from .coding_effect import ReferenceText
from .fingerprint_msa import hash_decoder
from .fitted_transforms import FittedTransforms
from .key_value_gradients import KINDS, HeadSamples, calibrating, context_gradients
from .transform_fitting import fit_transform

logger = logging.getLogger(__name__)

Name = tuple[str, int]  # kind, layer
Matrices = dict[Name, torch.Tensor]  # [G, D, D] float64
Choices = dict[Name, list[Parts]]  # of every head


@dataclass(frozen=True)
class CalibrationPlan:
    """How a calibration works; the defaults take minutes on one core for a model of 0.1 billion weights.

    Args:
        context, continuation: tokens of a segment of text that are coded, and that read them.
        segments: of all texts together, at most; one of each text comes first.
        directions: gradients taken of a segment. stride: every how-many-th token is kept.
        key_floor, value_floor: bits per coordinate that every head gets at least: what a head is worth to the
            texts at hand does not tell what it is worth to others.
        key_shrinkage, value_shrinkage: see `fit_transform`.
        measured: segments on which KL is measured. depths: groups of layers that it is measured for.
        rounds: how often measured KL corrects the prices.
        seed: of everything random.
    """

    context: int = 1024
    continuation: int = 512
    segments: int = 10
    directions: int = 2
    stride: int = 2
    key_floor: float = 0.5
    value_floor: float = 0.75
    key_shrinkage: float = 0.1
    value_shrinkage: float = 0.5
    measured: int = 2
    depths: int = 6
    rounds: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("context", "continuation", "segments", "directions", "stride", "measured", "depths"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0; got {self.rounds}")


def calibrate(
    model: Any,
    texts: Sequence[str | Sequence[int]],
    average_bits: float = 2.7,
    *,
    tokenizer: Any = None,
    transforms: bool = True,
    settings: CacheSettings | None = None,
    **plan: Any,
) -> Calibration:
    """Finds bits and transforms for the caches of a model.

    Args:
        texts: text, or token ids; those that are shorter than a segment are left out.
        average_bits: for each number of the packed keys and values, with scales and means counted.
        tokenizer: of the texts; by default the one that lies with the model.
        transforms: whether transforms are fitted, too; bit maps alone are one small JSON file.
        settings: everything but the bits. plan: fields of `CalibrationPlan`.

    Raises:
        ValueError: fewer than two segments of text, too few bits, or a bad field of the plan.
    """
    plan = CalibrationPlan(**plan)
    settings = settings or CacheSettings()
    segments, owners = cut_segments(_token_rows(model, texts, tokenizer), plan)
    logger.info("gradients of %d segments of %d texts", len(segments), len(set(owners)))
    samples = context_gradients(
        model, segments, plan.context, settings, plan.directions, plan.stride, plan.seed
    )
    if not samples:
        raise ValueError("no layer of this model is packed by a TurboQuantCache: nothing to calibrate")
    pricing = _Pricing(samples, _folds(owners), plan, settings, transforms)
    budget = _Budget(samples, average_bits, settings, plan, pricing.choices)
    held_out = pricing.folds[1][: plan.measured]
    with calibrating(model), torch.no_grad():
        references = [ReferenceText(model, segments[number], plan.context) for number in held_out]
        corrections = {name: _STARTING[name[0]] for name in samples}
        for _ in range(plan.rounds):
            chosen = budget.spend(pricing.costs, corrections)
            coded = pricing.coded(references, chosen, owner=0)
            corrections = _measured_corrections(references, coded, pricing, chosen, plan)
        chosen = budget.spend(pricing.costs, corrections)
        coded = pricing.coded(references, chosen, owner=0)
        measured = _divergence(references, coded)
    predicted = sum(corrections[name] * cost for name, cost in pricing.priced(chosen).items())
    logger.info("%.3f bits: KL %.5f predicted, %.5f measured", budget.average(chosen), predicted, measured)
    return Calibration(
        settings=_with_bits(settings, chosen, model.config),
        model=identity(model.config),
        transforms=pricing.fitted(chosen) if transforms else None,
        weights=hash_decoder(model),
        details={
            "average_bits": average_bits,
            "bits": budget.average(chosen),
            "key_bits": budget.average(chosen, ("keys",)),
            "value_bits": budget.average(chosen, ("values",)),
            "counted": "codes, scales and key means of the packed tokens, by number of keys and values",
            "predicted_kl": predicted,
            "measured_kl": measured,
            "text_tokens": [len(row) for row in segments],
            "plan": asdict(plan),
        },
    )


# Measured KL over predicted KL where nothing was measured: errors of values are alike between tokens.
_STARTING = {"keys": 1.7, "values": 4.3}


class _Pricing:
    """Transforms, and what every coding of every head costs on texts that they were not fitted to."""

    def __init__(
        self,
        samples: dict[Name, HeadSamples],
        folds: tuple[list[int], list[int]],
        plan: CalibrationPlan,
        settings: CacheSettings,
        transforms: bool,
    ):
        self.samples, self.folds, self.plan, self.settings = samples, folds, plan, settings
        self.transforms = transforms
        self.choices = {name: codings(own.vectors.shape[-1]) for name, own in samples.items()}
        self.matrices: list[Matrices] = [{}, {}, {}]  # fitted to either fold, and to all texts
        self.costs: dict[Name, torch.Tensor] = {}
        tokens = plan.context - settings.sinks - settings.window
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

    def fitted(self, chosen: Choices, owner: int = 2) -> FittedTransforms:
        """The matrices of one fit, [G, D, D] float16, the coordinates of every part of a typical size."""
        found = {}
        for (kind, layer), matrix in self.matrices[owner].items():
            vectors = self.samples[kind, layer].vectors.float().transpose(0, 1).flatten(1, 2)
            scaled = [
                _typical_sizes(own, vectors[head], parts)
                for head, (own, parts) in enumerate(zip(matrix, chosen[kind, layer]))
            ]
            found[f"layers.{layer}.{kind}"] = torch.stack(scaled).half()
        return FittedTransforms(found)

    def coded(self, references: list[ReferenceText], chosen: Choices, owner: int) -> list:
        """The contexts of some texts as a cache gives them back."""
        fitted = self.fitted(chosen, owner) if self.transforms else None
        settings = _with_bits(self.settings, chosen, references[0].model.config)
        return [reference.coded(settings, fitted) for reference in references]


class _Budget:
    """Bits of a token in all packed layers, and what of them each choice takes."""

    def __init__(self, samples, average_bits: float, settings: CacheSettings, plan: CalibrationPlan, choices):
        self.choices, self.average_bits = choices, average_bits
        self.shapes = {name: (own.vectors.shape[1], own.vectors.shape[-1]) for name, own in samples.items()}
        self.scale_bits = {"keys": settings.key_scale_bits, "values": settings.value_scale_bits}
        self.mean_bits = 16 / settings.mean_group if settings.mean_group else 0.0  # of a number of a key
        self.floors = {"keys": plan.key_floor, "values": plan.value_floor}
        self.total = sum(
            heads * dim * (average_bits - self._mean(name)) for name, (heads, dim) in self._items()
        )

    def spend(self, costs: dict[Name, torch.Tensor], corrections: dict[Name, float]) -> Choices:
        """The choice for every head of the lowest total cost. Raises ValueError if nothing is that small."""
        units, owners = [], []
        for (kind, layer), (heads, dim) in self._items():
            bits = [vector_bits(parts, self.scale_bits[kind]) for parts in self.choices[kind, layer]]
            codes = [sum(width * bits for width, bits in parts) for parts in self.choices[kind, layer]]
            allowed = [i for i, count in enumerate(codes) if count >= self.floors[kind] * dim]
            for head in range(heads):
                own = costs[kind, layer][head, allowed].double() * corrections[kind, layer]
                units.append(Unit(own, torch.tensor(bits)[allowed]))
                owners.append(((kind, layer), allowed))
        try:
            chosen = allocate(units, floor(self.total + 1e-9))
        except ValueError as error:
            raise ValueError(
                f"average_bits = {self.average_bits} is too few for this model: {error}"
            ) from None
        found: Choices = {name: [] for name in self.shapes}
        for (name, allowed), place in zip(owners, chosen):
            found[name].append(self.choices[name][allowed[place]])
        return found

    def average(self, chosen: Choices, kinds: Sequence[str] = KINDS) -> float:
        """Bits of a number of the packed keys and values: codes, scales and means."""
        bits = elements = 0.0
        for name, (heads, dim) in self._items():
            if name[0] in kinds:
                elements += heads * dim
                bits += heads * dim * self._mean(name)
                bits += sum(vector_bits(parts, self.scale_bits[name[0]]) for parts in chosen[name])
        return bits / elements

    def _mean(self, name: Name) -> float:
        return self.mean_bits if name[0] == "keys" else 0.0

    def _items(self):
        return self.shapes.items()


def _measured_corrections(
    references: list[ReferenceText], coded: list, pricing: _Pricing, chosen: Choices, plan: CalibrationPlan
) -> dict[Name, float]:
    """Measured over predicted KL of every layer and kind, the same for the layers of a group."""
    priced, corrections = pricing.priced(chosen), {}
    layers = sorted({layer for _, layer in priced})
    size = -(-len(layers) // plan.depths)
    for kind in KINDS:
        for start in range(0, len(layers), size):
            group = layers[start : start + size]
            measured = _divergence(references, coded, (kind,), group)
            predicted = sum(priced[kind, layer] for layer in group)
            ratio = min(max(measured / max(predicted, 1e-30), 1e-3), 1e3)
            logger.info(
                "%s of layers %d-%d: KL %.6f predicted, %.6f measured",
                kind,
                group[0],
                group[-1],
                predicted,
                measured,
            )
            corrections |= {(kind, layer): ratio for layer in group}
    return corrections


def _divergence(references: list[ReferenceText], coded: list, kinds=KINDS, layers=None) -> float:
    values = [one.divergence(states, kinds, layers) for one, states in zip(references, coded)]
    return sum(values) / len(values)


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


def _with_bits(settings: CacheSettings, chosen: Choices, config: Any) -> CacheSettings:
    """The settings with a bit map; layers that are not packed have a number that nobody reads."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    maps = {
        kind: [
            [spec(parts) for parts in chosen[kind, i]] if (kind, i) in chosen else 4 for i in range(layers)
        ]
        for kind in KINDS
    }
    return replace(settings, key_bits=maps["keys"], value_bits=maps["values"])


def cut_segments(rows: list[list[int]], plan: CalibrationPlan) -> tuple[list[list[int]], list[int]]:
    """(segments, the text that each is from): one of every text, then the second ones, up to the plan's
    number.

    Raises ValueError if there are fewer than two.
    """
    length = plan.context + plan.continuation
    cut = [[row[i : i + length] for i in range(0, len(row) - length + 1, length)] for row in rows]
    depth = max(map(len, cut), default=0)
    order = [(place, text) for place in range(depth) for text in range(len(cut)) if place < len(cut[text])]
    order = order[: plan.segments]
    if len(order) < 2:
        raise ValueError(
            f"texts must hold at least two segments of {length} tokens (context + continuation); got "
            f"{len(order)} from {len(rows)} texts of {[len(row) for row in rows]} tokens"
        )
    return [cut[text][place] for place, text in order], [text for _, text in order]


def _folds(owners: list[int]) -> tuple[list[int], list[int]]:
    """Two halves of the segments; no text is in both, if there is more than one."""
    texts = sorted(set(owners))
    half = {text: number % 2 for number, text in enumerate(texts)}
    side = [half[text] for text in owners] if len(texts) > 1 else [i % 2 for i in range(len(owners))]
    return [i for i, own in enumerate(side) if own == 0], [i for i, own in enumerate(side) if own == 1]


def _token_rows(model: Any, texts: Sequence[str | Sequence[int]], tokenizer: Any) -> list[list[int]]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts or of token ids; got one text")
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the model has no tokenizer at {model.name_or_path!r} ({error}): give one, or token ids"
            ) from error
    return [
        tokenizer(text)["input_ids"] if isinstance(text, str) else [int(token) for token in text]
        for text in texts
    ]
