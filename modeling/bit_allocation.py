"""How many bits each head's keys and values get: what a coding costs, the cheapest choice within a budget.

Axis letters: S random directions, G key/value heads, n tokens, D head dim, U units (keys or values of a
head), C codings.
"""

from dataclasses import dataclass

import torch

from .bit_packing import MOST_BITS, packed_bytes
from .codebooks import distortion

Parts = tuple[tuple[int, int], ...]  # (width, bits) of consecutive coordinates

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
