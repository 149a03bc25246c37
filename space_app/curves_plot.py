"""KL over bits as a drawing (SVG): once for wide screens and once for narrow ones, in the page's colours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from msa_hf.evaluation.cache_curves import OURS, Curve, CurvePoint, cache_curves

MIXED, PLAIN = "msa_hf, mixed widths (calibrated)", "msa_hf, one width"
BITS = (2, 4, 8, 16, 32, 64)
MARKERS = (
    "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
    "M-5-5H5V5H-5Z",
    "M0-6L6 5H-6Z",
    "M0-6.5L6.5 0L0 6.5L-6.5 0Z",
    "M0 6L6-5H-6Z",
    "M-5-5L5 5M5-5L-5 5",
    "M-6 0H6M0-6V6",
    "M-5 0H5M-3-5L3 5M3-5L-3 5",
)


@dataclass(frozen=True)
class Frame:
    """Where the drawing's axes lie, in its own units, which are pixels at its own width."""

    name: str
    width: int
    height: int
    left: int
    ends: tuple[float, float] = (1.6, 110.0)
    kls: tuple[float, float] = (7e-4, 4.0)

    def x(self, bits: float) -> float:
        return self.left + (self.width - self.left - 14) * _share(bits, *self.ends)

    def y(self, kl: float) -> float:
        return 14 + (self.height - 58) * (1 - _share(kl, *self.kls))


FRAMES = (Frame("wide", 960, 400, 62), Frame("narrow", 350, 360, 52))


def curves(results: Mapping[str, Any]) -> str:
    """The drawings, their legend, the figures as a table, and where they come from."""
    series = _series(cache_curves(results))
    drawings = "".join(_drawing(frame, series) for frame in FRAMES)
    keys = "".join(
        f'<span class="msa-s{number}"><svg viewBox="-8 -8 16 16" width="14" height="14" aria-hidden="true">'
        f'<path d="{MARKERS[number]}"/></svg>{escape(curve.name)}</span>'
        for number, curve in enumerate(series)
    )
    command, machine = escape(results["command"]), escape(results["machine"])
    protocol = results["protocol"]
    return (
        '<section class="msa-curves"><h3>What a bit buys</h3>'
        '<p class="msa-hint">Farther down is closer to the dense cache, farther left is smaller. Both axes '
        "are logarithmic; lines through the points are 95 % intervals. Bits count codes, scales and all else "
        "that a cache holds, so that packages which keep a decoded copy stand far to the right.</p>"
        f'<div class="msa-keys">{keys}</div>{drawings}{_table(series)}'
        f'<p class="msa-hint">{escape(results["model"])}, {escape(results["dtype"])}, {results["texts"]} '
        f"texts, {protocol['prefill']:,} tokens read and {protocol['decoded']} compared. Measured "
        f"{escape(results['date'])} on {machine}, with <code>{command}</code></p></section>"
    )


def _series(found: Sequence[Curve]) -> list[Curve]:
    """Ours as two, because calibrated mixed widths and single widths are no one curve."""
    result = []
    for curve in found:
        if curve.name == OURS:
            mixed = [point for point in curve.points if "." in point.system]
            plain = [point for point in curve.points if "." not in point.system]
            result += [Curve(name, own) for name, own in ((MIXED, mixed), (PLAIN, plain)) if own]
        else:
            result.append(replace(curve, points=sorted(curve.points, key=lambda p: (p.bits, -p.kl))))
    return result[: len(MARKERS)]


def _drawing(frame: Frame, series: Sequence[Curve]) -> str:
    low, high = frame.kls
    floor, right = frame.height - 44, frame.width - 14
    lines, texts = [], []
    for bits in BITS:
        x = frame.x(bits)
        lines.append(f"M{x:.1f} 14V{floor}")
        texts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{bits}</text>')
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        y = frame.y(10.0**power)
        lines.append(f"M{frame.left} {y:.1f}H{right}")
        label = f"{10.0**power:g}"
        texts.append(f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    middle = (frame.left + right) / 2
    texts.append(f'<text x="{middle:.1f}" y="{frame.height - 8}" text-anchor="middle">bits per number</text>')
    texts.append(
        f'<text transform="translate(12 {(14 + floor) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        "KL to the dense cache, nats</text>"
    )
    drawn = "".join(_curve(frame, number, curve) for number, curve in reversed(list(enumerate(series))))
    return (
        f'<svg class="msa-plot msa-{frame.name}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        'aria-label="KL to the dense cache over bits per number; the table below has the figures">'
        f'<path class="msa-grid" d="{"".join(lines)}"/>{drawn}{"".join(texts)}</svg>'
    )


def _curve(frame: Frame, number: int, curve: Curve) -> str:
    places = [(frame.x(point.bits), frame.y(point.kl)) for point in curve.points]
    line = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
    spans = "".join(
        f"M{x:.1f} {frame.y(max(point.low, frame.kls[0])):.1f}V{frame.y(point.high):.1f}"
        for (x, _), point in zip(places, curve.points)
    )
    marks = "".join(
        f'<path class="msa-mark" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[number]}">'
        f"<title>{_told(point)}</title></path>"
        for (x, y), point in zip(places, curve.points)
    )
    return (
        f'<g class="msa-s{number}"><path class="msa-span" d="{spans}"/><path class="msa-curve" d="{line}"/>'
        f"{marks}</g>"
    )


def _told(point: CurvePoint) -> str:
    return f"{escape(point.system)}: {point.bits:g} bits, KL {point.kl:g} [{point.low:g}, {point.high:g}]"


def _table(series: Sequence[Curve]) -> str:
    rows = "".join(
        f"<tr><td><b>{escape(point.system)}</b><small>{escape(curve.name)}</small></td><td>{point.bits:.2f}</td>"
        f"<td>{point.kl:g} <small>[{point.low:g}, {point.high:g}]</small></td></tr>"
        for curve in series
        for point in curve.points
    )
    return (
        '<details class="msa-sources"><summary>The figures as a table</summary>'
        '<div class="msa-scroll" tabindex="0" role="region" aria-label="KL and bits">'
        '<table class="msa-table"><thead><tr><th scope="col">Cache</th><th scope="col">Bits</th>'
        f'<th scope="col">KL, nats</th></tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)
