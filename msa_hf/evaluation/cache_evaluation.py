"""What the cache benchmark found: tables, JSON, and a plot of KL over bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from msa_hf.evaluation.cache_length import LengthQuality
from msa_hf.evaluation.cache_mmlu import MmluScore
from msa_hf.evaluation.cache_needle import NeedleScore
from msa_hf.evaluation.cache_quality import CacheQuality, Protocol
from msa_hf.evaluation.cache_speed import CacheBytes
from msa_hf.evaluation.decode_speed import SpeedRatio
from msa_hf.evaluation.environment import Environment
from msa_hf.evaluation.metrics import Estimate, paired_difference


@dataclass(frozen=True)
class PeerComparison:
    """A peer beside our best system that takes no more bits; None: we have none as small."""

    peer: str
    peer_bits: float
    system: str | None
    bits: float | None
    difference: Estimate | None  # KL of the system minus KL of the peer, paired over texts


@dataclass(frozen=True)
class CacheEvaluation:
    """Everything that one run measured; parts that were not asked for are empty."""

    model: str
    dtype: str
    systems: list[str]
    texts: int
    protocol: Protocol
    environment: Environment
    quality: list[CacheQuality] = field(default_factory=list)
    comparisons: list[PeerComparison] = field(default_factory=list)
    bytes: list[CacheBytes] = field(default_factory=list)
    length: list[LengthQuality] = field(default_factory=list)
    needle: list[NeedleScore] = field(default_factory=list)
    mmlu: list[MmluScore] = field(default_factory=list)
    speed: dict[str, list[SpeedRatio]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it has no figures
    requirements: dict[str, str] = field(default_factory=dict)  # peer -> what pip installed

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


def compare_with_peers(quality: Sequence[CacheQuality]) -> list[PeerComparison]:
    """Each peer with the system of lowest KL among those of ours that take no more bits."""
    ours = [result for result in quality if not result.peer]
    rows = []
    for peer in (result for result in quality if result.peer):
        fitting = [result for result in ours if result.bits <= peer.bits]
        best = min(fitting, key=lambda result: result.kl.mean, default=None)
        difference = paired_difference(best.kl_by_text, peer.kl_by_text) if best else None
        rows.append(
            PeerComparison(peer.name, peer.bits, best and best.name, best.bits if best else None, difference)
        )
    return rows


def render(report: CacheEvaluation) -> str:
    """The report as text tables."""
    lines = [f"Quantised caches: {report.model}, {report.dtype}", str(report.environment)]
    for part in (_quality, _comparisons, _length, _needle, _mmlu, _speed, _bytes, _missing):
        if table := part(report):
            lines += ["", *table]
    return "\n".join(lines)


def _quality(report: CacheEvaluation) -> list[str]:
    if not report.quality:
        return []
    width = max(len(result.name) for result in report.quality)
    lines = [
        f"Quality over {report.texts} texts: {report.protocol.prefill:,} tokens prefilled, "
        f"{report.protocol.decoded} decoded in blocks of {report.protocol.block} (95 % intervals over texts; "
        "bits per element, marginal, from tensors held)",
        f"{'':{width}} {'bits':>6} {'KL to dense (nats)':>25} {'NLL':>8} {'first token equal':>21}",
    ]
    for result in sorted(report.quality, key=lambda result: (-result.bits, result.kl.mean)):
        kl = f"{result.kl.mean:.4f} [{result.kl.low:.4f}, {result.kl.high:.4f}]"
        lines.append(
            f"{result.name:{width}} {result.bits:>6.2f} {kl:>25} {result.nll_percent:>+7.2f}% "
            f"{str(result.agreement):>21}"
        )
    return lines


def _comparisons(report: CacheEvaluation) -> list[str]:
    if not report.comparisons:
        return []
    lines = ["Our best at no more bits, KL minus the peer's (paired over texts):"]
    for row in report.comparisons:
        peer = f"{row.peer} ({row.peer_bits:.2f} bits)"
        if row.difference is None:
            lines.append(f"  {peer:32} none of ours takes as few bits")
        else:
            difference = row.difference
            interval = _signed(difference)
            lines.append(f"  {peer:32} {row.system} ({row.bits:.2f} bits): {interval}")
    return lines


def _length(report: CacheEvaluation) -> list[str]:
    if not report.length:
        return []
    tokens, edge, prefill = report.length[0].tokens, report.length[0].edge, report.length[0].prefill
    texts = len(report.length[0].first.kl_by_text)
    lines = [
        f"Quality over length, {texts} texts: passages of {edge} tokens, the last of {tokens:,} decoded ones "
        f"and the same",
        f"right after {prefill:,} tokens; then closing ones after one prefill, and opening ones, other words "
        "(paired over texts)",
        f"{'':12} {'':19} {'KL to dense (nats)':>27} {'difference':>30} {'dense NLL':>21}",
    ]
    for row in report.length:
        for title, part, difference in (
            ("last", row.last, None),
            ("first", row.first, row.over_first),
            ("closing, last", row.closing, None),
            ("closing, one piece", row.closing_in_one_piece, row.over_one_piece),
            ("opening, first", row.opening, row.as_it_stands),
        ):
            against = _signed(difference, 5) if difference else ""
            lines.append(
                f"{row.name:12} {title:19} {_fine(part.kl):>27} {against:>30} {str(part.dense_nll):>21}"
            )
    return lines


def _needle(report: CacheEvaluation) -> list[str]:
    if not report.needle:
        return []
    lengths = list(report.needle[0].by_length)
    lines = [
        f"Needle retrieval: {len(report.needle[0].found)} facts in prose of {lengths} tokens, greedy",
        f"{'':12} {'found':>21} " + " ".join(f"{length:>7,}" for length in lengths) + "   against dense",
    ]
    for row in report.needle:
        cells = " ".join(f"{row.by_length[length]:>7.3f}" for length in lengths)
        against = _signed(row.difference) if row.difference else ""
        lines.append(f"{row.name:12} {str(row.score):>21} {cells}   {against}".rstrip())
    return lines


def _mmlu(report: CacheEvaluation) -> list[str]:
    if not report.mmlu:
        return []
    tokens = report.mmlu[0].storage["prefix_tokens"]
    lines = [
        f"MMLU, 5-shot: {len(report.mmlu[0].answers)} questions, examples of {tokens:,.0f} tokens on average "
        "kept in the cache",
        f"{'':12} {'accuracy':>21} {'retained':>21} {'same answer':>12}",
    ]
    for row in report.mmlu:
        retained = "" if row.retained is None else str(row.retained)
        same = "" if row.same_answer is None else f"{row.same_answer:.3f}"
        lines.append(f"{row.name:12} {str(row.accuracy):>21} {retained:>21} {same:>12}")
        if "packed_tokens" in row.storage:
            lines.append(f"{'':12}   {_storage(row.storage)}")
    return lines


def _storage(held: dict[str, float]) -> str:
    """The cached examples, mean over subjects; what is not packed is told apart."""
    dense = held["dense"] / held["tokens"]  # bytes of a token in bfloat16
    return (
        f"{held['packed_tokens']:,.0f} of {held['tokens']:,.0f} tokens packed in {held['bits']:.2f} bits per "
        f"element ({16 / held['bits']:.1f}x); recent window {held['window'] / 1e3:,.0f} kB, sinks and "
        f"extremes {held['exact'] / 1e3:,.0f} kB in model precision (bfloat16 token: {dense / 1e3:,.1f} kB)"
    )


def _speed(report: CacheEvaluation) -> list[str]:
    if not report.speed:
        return []
    width = max(len(name) for name in report.speed)
    lines = [
        "Decode speed over DynamicCache's in one process: median [lowest, highest] of groups taking turns,",
        "and of all seconds; most bytes of a step beyond the cache, beside a layer's dense keys and values",
        f"{'':{width}} {'context':>8} {'ratio':>19} {'overall':>8} {'ms/token':>9} {'step':>9} {'layer':>10}",
    ]
    for name, rows in report.speed.items():
        for row in rows:
            ratio = f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]"
            lines.append(
                f"{name:{width}} {row.context:>8,} {ratio:>19} {row.overall:>8.2f} {row.system_ms:>9.1f} "
                f"{_megabytes(row.step_bytes):>9} {_megabytes(row.layer_bytes):>10}"
            )
    return lines


def _bytes(report: CacheEvaluation) -> list[str]:
    if not report.bytes:
        return []
    lines = [
        "Bytes held: every reachable tensor, and what the cache reports",
        f"{'':12} {'tokens':>8} {'counted':>14} {'reported':>14} {'of bfloat16':>12}",
    ]
    for row in report.bytes:
        reported = "no report" if row.reported is None else f"{row.reported:,}"
        share = f"{row.counted / row.bfloat16:.3f}"
        lines.append(f"{row.name:12} {row.tokens:>8,} {row.counted:>14,} {reported:>14} {share:>12}")
    return lines


def _missing(report: CacheEvaluation) -> list[str]:
    return [f"no figures for {name}: {reason}" for name, reason in report.missing.items()]


def _fine(estimate: Estimate) -> str:
    return f"{estimate.mean:.5f} [{estimate.low:.5f}, {estimate.high:.5f}]"


def _signed(estimate: Estimate, digits: int = 4) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def save_plot(report: CacheEvaluation, path: str | Path) -> None:
    """KL over marginal bits, ours and the peers'. Needs matplotlib; raises ValueError without quality."""
    from matplotlib.figure import Figure

    if not report.quality:
        raise ValueError("a plot needs the part quality")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[CacheQuality]] = {}
    for result in report.quality:
        if result.kl.mean > 0:
            groups.setdefault(result.name.rpartition(" ")[0][:-2] if result.peer else "msa_hf", []).append(
                result
            )
    for name, rows in groups.items():
        rows = sorted(rows, key=lambda result: result.bits)
        means = [row.kl.mean for row in rows]
        errors = [[row.kl.mean - row.kl.low for row in rows], [row.kl.high - row.kl.mean for row in rows]]
        style = {"marker": "o", "linewidth": 2} if name == "msa_hf" else {"marker": "x", "linestyle": "--"}
        axes.errorbar([row.bits for row in rows], means, yerr=errors, capsize=2, label=name, **style)
        for row in rows if name == "msa_hf" else []:
            axes.annotate(
                row.name,
                (row.bits, row.kl.mean),
                fontsize="x-small",
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"])
    axes.set_xlabel("marginal bits per key or value element")
    axes.set_ylabel("KL to the dense cache (nats)")
    axes.set_title(f"{report.model}, {report.texts} texts")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
