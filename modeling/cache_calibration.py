"""Calibration of a TurboQuantCache: bits per layer, head and kind, and transforms, for one model.

1. Gradients of texts say what an error of each key and value costs (`key_value_gradients`).
2. A transform is fitted to every head (`transform_fitting`), and every coding of it is priced on texts that
   it was not fitted to (`coding_prices`).
3. Bits go where they save most. The KL that the model then shows, layer by layer and altogether, corrects
   the prices, since errors spread across layers and gather over tokens; bits are given out anew.

Axis letters: G key/value heads, C codings, D head dim.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from .bit_allocation import BitBudget, Choices, Name, spec
from .cache_settings import CacheSettings
from .calibration_files import Calibration, identity
from .calibration_plan import CalibrationPlan, cut_segments, halves, spaced, token_rows
from .coding_effect import Coded, ReferenceText
from .coding_prices import CodingPrices
from .fingerprint_msa import hash_decoder
from .fitted_transforms import FittedTransforms
from .key_value_gradients import KINDS, calibrating, context_gradients

logger = logging.getLogger(__name__)

# Measured KL over predicted KL where nothing was measured: errors of values are alike between tokens.
_STARTING = {"keys": 1.7, "values": 4.3}
_NOISE = 0.1  # differences of measured KL that two segments cannot tell from none


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
    segments, owners = cut_segments(token_rows(model, texts, tokenizer), plan)
    logger.info("gradients of %d segments of %d texts", len(segments), len(set(owners)))
    samples = context_gradients(
        model, segments, plan.context, settings, plan.directions, plan.stride, plan.seed
    )
    if not samples:
        raise ValueError("no layer of this model is packed by a TurboQuantCache: nothing to calibrate")
    prices = CodingPrices(samples, halves(owners), plan, settings, transforms)
    shapes = {name: (own.vectors.shape[1], own.vectors.shape[-1]) for name, own in samples.items()}
    floors = {"keys": plan.key_floor, "values": plan.value_floor}
    budget = BitBudget(shapes, prices.choices, average_bits, settings, floors)
    held_out = spaced(prices.folds[1], plan.measured)
    with calibrating(model), torch.no_grad():
        references = [ReferenceText(model, segments[number], plan.context) for number in held_out]
        measured, predicted, chosen = _best_choice(references, prices, budget, settings, plan)
    logger.info("%.3f bits: KL %.5f predicted, %.5f measured", budget.average(chosen), predicted, measured)
    return Calibration(
        settings=_with_bits(settings, chosen, model.config),
        model=identity(model.config),
        transforms=prices.fitted(chosen),
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


def _best_choice(
    references: list[ReferenceText],
    prices: CodingPrices,
    budget: BitBudget,
    settings: CacheSettings,
    plan: CalibrationPlan,
) -> tuple[float, float, Choices]:
    """(measured KL, predicted KL, choice) of the last round whose measured KL is about the lowest."""
    found, corrections = [], {name: _STARTING[name[0]] for name in prices.costs}
    for number in range(plan.rounds + 1):
        chosen = budget.spend(prices.costs, corrections)
        priced = prices.priced(chosen)
        # Fitted to one half of the segments and measured on the other.
        coded = _coded(references, settings, chosen, prices.fitted(chosen, fit=0))
        measured = _divergence(references, coded)
        predicted = sum(corrections[name] * cost for name, cost in priced.items())
        logger.info("round %d: KL %.6f predicted, %.6f measured", number, predicted, measured)
        found.append((measured, predicted, chosen))
        if number < plan.rounds:
            corrections = _measured_corrections(references, coded, priced, plan)
    lowest = min(measured for measured, _, _ in found)
    return [one for one in found if one[0] <= (1 + _NOISE) * lowest][-1]


def _measured_corrections(
    references: list[ReferenceText], coded: list[Coded], priced: dict[Name, float], plan: CalibrationPlan
) -> dict[Name, float]:
    """Measured over predicted KL of every layer and kind.

    How layers compare is measured on few tokens, what all layers of a kind do together on all of them.
    """
    corrections = {}
    for kind in KINDS:
        own = {name: cost for name, cost in priced.items() if name[0] == kind}
        alone = {name: _divergence(references, coded, (kind,), (name[1],), plan.probe_tokens) for name in own}
        together = _divergence(references, coded, (kind,))
        logger.info("%s: KL %.6f predicted, %.6f measured", kind, sum(own.values()), together)
        factor = together / max(sum(alone.values()), 1e-30)
        for name, cost in own.items():
            ratio = factor * alone[name] / max(cost, 1e-30)
            corrections[name] = min(max(ratio, 1e-3), 1e3)
    return corrections


def _coded(
    references: list[ReferenceText],
    settings: CacheSettings,
    chosen: Choices,
    transforms: FittedTransforms | None,
) -> list[Coded]:
    """The contexts of some texts as a cache gives them back."""
    settings = _with_bits(settings, chosen, references[0].model.config)
    return [reference.coded(settings, transforms) for reference in references]


def _divergence(
    references: list[ReferenceText], coded: list[Coded], kinds=KINDS, layers=None, tokens=None
) -> float:
    values = [one.divergence(states, kinds, layers, tokens) for one, states in zip(references, coded)]
    return sum(values) / len(values)


def _with_bits(settings: CacheSettings, chosen: Choices, config: Any) -> CacheSettings:
    """The settings with a bit map; layers that are not packed have a number that nobody reads."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    maps = {
        kind: [
            [spec(parts) for parts in chosen[kind, i]] if (kind, i) in chosen else 4 for i in range(layers)
        ]
        for kind in KINDS
    }
    return replace(settings, key_bits=maps["keys"], value_bits=maps["values"], first_key_bits=None)
