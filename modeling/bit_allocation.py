"""How many bits each head's keys and values get: what a coding costs, the cheapest choice within a budget.

Axis letters: S random directions, G key/value heads, n tokens, D head dim, U units (keys or values of a
head), C codings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import torch

from .bit_packing import MOST_BITS, packed_bytes
from .cache_settings import CacheSettings
from .codebooks import distortion

Parts = tuple[tuple[int, int], ...]  # (width, bits) of consecutive coordinates
Name = tuple[str, int]  # "keys" or "values", and the layer
Choices = dict[Name, list[Parts]]  # of every head

STEP = 8  # widths of parts, so that codes fill whole bytes


@dataclass(frozen=True)
class Unit:
    """What may be chosen for a head's keys or values: costs [C] in nats and bits of a vector [C]."""

    costs: torch.Tensor
    bits: torch.Tensor


def codings(dim: int) -> list[Parts]:
    """Codings of a vector: one part, or two of which the first has more bits."""
    every = range(1, MOST_BITS + 1)
    pairs = [(high, low) for high in every for low in every if high > low]
    split = [
        ((width, high), (dim - width, low))
        for width in range(STEP, dim - STEP + 1, STEP)
        for high, low in pairs
    ]
    return [((dim, bits),) for bits in every] + split


def vector_bits(parts: Parts, scale_bits: int) -> int:
    """Bits that a coded vector takes, its scales included."""
    return sum(8 * packed_bytes(width, bits) + scale_bits for width, bits in parts)


def spec(parts: Parts) -> str:
    """Parts as `CacheSettings` takes them, such as "16x4+48x1"."""
    return "+".join(f"{width}x{bits}" for width, bits in parts)


def coding_costs(
    vectors: torch.Tensor, gradients: torch.Tensor, encode: torch.Tensor, choices: list[Parts]
) -> torch.Tensor:
    """What each coding costs the tokens of a context, on average: [G, C], in nats per token.

    The noise of a part is |y|^2 D / width in each of its coordinates, and independent of everything else.

    Args:
        vectors: [G, n, D]. gradients: [S, G, n, D]. encode: [G, D, D].
    """
    encode = encode.to(vectors.dtype)
    energy = (vectors @ encode).square().cumsum(dim=-1)
    back = torch.linalg.inv(encode.double()).to(vectors.dtype).mT
    need = sum((own @ back).square() for own in gradients).cumsum(dim=-1) / len(gradients)
    known: dict[tuple[int, int], torch.Tensor] = {}

    def product(start: int, stop: int) -> torch.Tensor:
        if (start, stop) not in known:
            parts = [
                total[..., stop - 1] - (total[..., start - 1] if start else 0.0) for total in (energy, need)
            ]
            known[start, stop] = (parts[0] * parts[1]).double().mean(dim=-1) / (stop - start)
        return known[start, stop]

    costs = []
    for parts in choices:
        start, cost = 0, 0.0
        for width, bits in parts:
            cost = cost + product(start, start + width) * distortion(width, bits)
            start += width
        costs.append(cost / 2)
    return torch.stack(costs, dim=-1).cpu()


def allocate(units: list[Unit], budget: int) -> list[int]:
    """The coding of each unit: the lowest sum of costs found with at most `budget` bits in all.

    A price per bit decides for all units at once, as low as the budget allows; what is left over goes where
    it helps most. Raises ValueError if even the smallest codings do not fit.
    """
    least = sum(int(unit.bits.min()) for unit in units)
    if least > budget:
        raise ValueError(f"{budget} bits do not hold {len(units)} units: they take at least {least}")
    if _spent(units, free := _choose(units, 0.0)) <= budget:
        return free
    low, high = -300.0, 300.0  # powers of 2: one price is too low, the other high enough
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _spent(units, _choose(units, 2.0**middle)) > budget:
            low = middle
        else:
            high = middle
    chosen = _choose(units, 2.0**high)
    return _spend_rest(units, chosen, budget - _spent(units, chosen))


def _choose(units: list[Unit], price: float) -> list[int]:
    """The cheapest coding of each unit at a price per bit; of equal ones that with fewer bits."""
    chosen = []
    for unit in units:
        total = unit.costs + price * unit.bits
        ties = torch.where(total == total.min(), unit.bits, unit.bits.max() + 1)
        chosen.append(int(ties.argmin()))
    return chosen


def _spent(units: list[Unit], chosen: list[int]) -> int:
    return sum(int(unit.bits[choice]) for unit, choice in zip(units, chosen))


def _spend_rest(units: list[Unit], chosen: list[int], rest: int) -> list[int]:
    """Better codings for single units, the largest gain first, while `rest` bits allow one."""
    while True:
        best = (0.0, 0, 0)
        for number, (unit, choice) in enumerate(zip(units, chosen)):
            gains = unit.costs[choice] - unit.costs
            gains = gains.masked_fill(unit.bits - unit.bits[choice] > rest, 0.0)
            place = int(gains.argmax())
            best = max(best, (float(gains[place]), number, place))
        gain, number, place = best
        if gain <= 0:
            return chosen
        rest -= int(units[number].bits[place] - units[number].bits[chosen[number]])
        chosen = [*chosen[:number], place, *chosen[number + 1 :]]


class BitBudget:
    """Bits of a token in all packed layers, and what of them each choice takes.

    Args:
        shapes: (G, D) of the keys and values of each packed layer. choices: the codings of each.
        average_bits: of a number, with scales and means counted.
        floors: bits per coordinate that every head's codes get at least, by kind.
    """

    def __init__(
        self,
        shapes: dict[Name, tuple[int, int]],
        choices: dict[Name, list[Parts]],
        average_bits: float,
        settings: CacheSettings,
        floors: dict[str, float],
    ):
        self.shapes, self.choices, self.average_bits, self.floors = shapes, choices, average_bits, floors
        self.scale_bits = {"keys": settings.key_scale_bits, "values": settings.value_scale_bits}
        self.mean_bits = 16 / settings.mean_group if settings.mean_group else 0.0  # of a number of a key
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

    def average(self, chosen: Choices, kinds: Sequence[str] = ("keys", "values")) -> float:
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
