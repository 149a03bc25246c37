"""The heat map of needles: depth down, length across, as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msa_hf.evaluation.memory_needle import NeedleCell, summarize
from msa_hf.evaluation.metrics import Estimate

FOUND, UNTOLD, LOST = "██", "▒▒", "··"


def render(cells: Sequence[NeedleCell]) -> str:
    """The map with its summary; a cell that has not been asked yet is blank."""
    if not cells:
        return "no needle was asked for"
    lengths, depths = _axes(cells)
    known = {(cell.length, cell.depth): cell for cell in cells}
    width = max(len(f"{length:,}") for length in lengths)
    lines = ["depth \\ tokens " + "  ".join(f"{length:>{width},}" for length in lengths)]
    for depth in depths:
        marks = [_mark(known.get((length, depth))) for length in lengths]
        lines.append(f"{depth:>14.0%} " + "  ".join(f"{mark:>{width}}" for mark in marks).rstrip())
    whole = summarize(cells)
    lines += [
        f"{FOUND} found   {UNTOLD} its document was read, the answer does not tell it   {LOST} not read",
        f"found {_share(whole.found)}, document read {_share(whole.selected)} of {whole.asked} (95 % Wilson)",
    ]
    return "\n".join(lines)


def to_dict(cells: Sequence[NeedleCell]) -> dict[str, Any]:
    """Plain data for JSON: the cells and their summary."""
    return {"cells": [cell.to_dict() for cell in cells], "summary": asdict(summarize(cells))}


def save_plot(cells: Sequence[NeedleCell], path: str | Path) -> None:
    """The map as a picture. Needs matplotlib."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lengths, depths = _axes(cells)
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        grid[depths.index(cell.depth)][lengths.index(cell.length)] = level(cell)
    colors = ("#c0392b", "#e6b800", "#2e8b57")
    figure = Figure(figsize=(2.5 + len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap=ListedColormap(colors), vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the memory")
    axes.set_ylabel("depth of the fact")
    names = ("not read", "read, not told", "found")
    axes.legend(
        handles=[Patch(color=color, label=name) for color, name in zip(colors, names)],
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    figure.savefig(path, dpi=150)


def level(cell: NeedleCell) -> int:
    """2 where the fact was found, 1 where its document was read, else 0."""
    return 2 if cell.found else int(cell.selected)


def _mark(cell: NeedleCell | None) -> str:
    return "" if cell is None else (LOST, UNTOLD, FOUND)[level(cell)]


def _axes(cells: Sequence[NeedleCell]) -> tuple[list[int], list[float]]:
    return sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
