"""KL over bits as curves to draw, from what `msa-hf eval cache` wrote or from the shipped results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from msa_hf.configs import preset

OURS = "msa_hf"
SHIPPED = "smollm2-135m-caches"  # the entry of configs/evaluation
_PEER_WIDTH = re.compile(r" \d+ bit$")


@dataclass(frozen=True)
class CurvePoint:
    """A cache: its bits per key or value element, and its KL to the dense cache in nats with the interval."""

    system: str
    bits: float
    kl: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The caches of one package, fewest bits first."""

    name: str
    points: list[CurvePoint]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def cache_curves(results: Mapping[str, Any]) -> list[Curve]:
    """One curve per package, ours first, the others by name.

    Args:
        results: what `msa-hf eval cache --parts quality` printed with --json or wrote with --out.

    Raises:
        ValueError: the results have no quality.
    """
    if not results.get("quality"):
        raise ValueError('results must have the part "quality" (msa-hf eval cache --parts quality); got none')
    groups: dict[str, list[CurvePoint]] = {}
    for row in results["quality"]:
        name = _PEER_WIDTH.sub("", row["name"]) if row["peer"] else OURS
        kl = row["kl"]
        point = CurvePoint(row["name"], row["bits"], kl["mean"], kl["low"], kl["high"])
        groups.setdefault(name, []).append(point)
    names = sorted(groups, key=lambda name: (name != OURS, name))
    return [Curve(name, sorted(groups[name], key=lambda point: point.bits)) for name in names]


def shipped_results() -> dict[str, Any]:
    """The measured figures that come with the package, with their command, machine and date."""
    return preset("evaluation", SHIPPED)
