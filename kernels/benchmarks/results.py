"""What a measurement found: error, time, peers and bars."""

from dataclasses import asdict, dataclass, field
from typing import Any

from timing import Ceilings, Timing


@dataclass(frozen=True)
class Bar:
    """A figure that this project asks for."""

    text: str
    measured: float
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def __str__(self) -> str:
        wanted = f"{'<=' if self.at_most else '>='} {self.wanted:g}"
        return f"| {self.text} | {self.measured:.2f} | {wanted} | {'met' if self.met else 'missed'} |"


@dataclass
class Result:
    """One measurement.

    Args:
        error: RMS ratio to the plain twin, None where there is nothing to compare. tolerance: its limit.
        ours: None if the result is wrong. nbytes, flops: what one call must read and write at least, and
            multiply and add; 0 where that says nothing. peers: by name.
    """

    name: str
    error: float | None = None
    tolerance: float = 0.0
    ours: Timing | None = None
    nbytes: int = 0
    flops: int = 0
    peers: dict[str, Timing] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    note: str = ""

    @property
    def right(self) -> bool:
        return self.error is None or self.error <= self.tolerance

    def ratio(self, peer: str) -> float:
        """How many times as long the first peer takes whose name begins like this; 0 if it did not run."""
        found = [timing for name, timing in self.peers.items() if name.startswith(peer)]
        return found[0].median / self.ours.median if found and self.ours else 0.0

    def of_copy(self, ceilings: Ceilings) -> float:
        return self.ours.per_second(self.nbytes) / ceilings.copy

    def of_matmul(self, ceilings: Ceilings) -> float:
        return self.ours.per_second(self.flops) / ceilings.matmul

    def summary(self) -> str:
        if not self.right:
            return f"WRONG, RMS ratio {self.error:.1e} over {self.tolerance:.0e}"
        peers = ", ".join(f"{self.ratio(name):.2f} x {name}" for name in self.peers)
        checked = "" if self.error is None else f"RMS ratio {self.error:.1e}, "
        return f"{checked}{self.ours.median:.4f} ms" + (f", {peers}" if peers else "")

    def row(self, ceilings: Ceilings, rehearsal: bool) -> str:
        """Of the table."""
        error = "" if self.error is None else f"{self.error:.1e}"
        name = f"{self.name} ({self.note})" if self.note else self.name
        if not self.right:
            return f"| {name} | **{error}** | wrong | | | |"
        if rehearsal:
            return f"| {name} | {error} | | | | {', '.join(self.peers)} |"
        ours = self.ours
        times = f"{ours.median:.4g} ({ours.low:.4g}-{ours.high:.4g})" + ("" if ours.graph else ", eager")
        copy = f"{self.of_copy(ceilings):.0%}" if self.nbytes else ""
        matmul = f"{self.of_matmul(ceilings):.0%}" if self.flops else ""
        peers = "<br>".join(f"{self.ratio(peer):.2f} x {peer}" for peer in self.peers)
        return f"| {name} | {error} | {times} | {copy} | {matmul} | {peers} |"

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self) | {"right": self.right}
        data["bars"] = [asdict(bar) | {"met": bar.met} for bar in self.bars]
        if self.ours and self.right:
            data["ratios"] = {peer: self.ratio(peer) for peer in self.peers}
            data["bytes_per_second"] = self.ours.per_second(self.nbytes)
            data["flops_per_second"] = self.ours.per_second(self.flops)
            data["of_copy"], data["of_matmul"] = self.of_copy(ceilings), self.of_matmul(ceilings)
        return data
