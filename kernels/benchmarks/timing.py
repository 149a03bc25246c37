"""Times of calls on a GPU: CUDA events around replayed CUDA graphs, in turns over several buffers."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of the runs, and the fastest and slowest of them.

    `graph`: replayed from a CUDA graph, so that the host's work is not in it.
    """

    median: float
    low: float
    high: float
    graph: bool

    def per_second(self, amount: float) -> float:
        return 1000 * amount / self.median


class Stopwatch:
    """Times calls on a device; on a CPU it only makes every call once, as a rehearsal.

    Args:
        runs: how often a time is taken. span: milliseconds that each of them lasts, about.
    """

    def __init__(self, device: torch.device, runs: int = 3, span: float = 60.0):
        self.device, self.runs, self.span = device, runs, span

    @property
    def rehearses(self) -> bool:
        return self.device.type != "cuda"

    def buffers(self, nbytes: int) -> int:
        """How many sets of operands of `nbytes` keep every one of them out of the cache until its turn."""
        if self.rehearses:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(24, max(3, -(-5 * cache // max(1, nbytes))))

    def time(self, calls: Sequence[Call], graph: bool = True) -> Timing:
        """Time of one of the calls, which do the same with operands of their own.

        Args:
            graph: whether to try a CUDA graph; False for calls that wait for the device or copy from the CPU.
        """
        if self.rehearses:
            return _rehearsed(calls)
        for call in calls:
            call()
        torch.cuda.synchronize()
        captured = _captured(calls) if graph else None
        turn = captured.replay if captured else lambda: [call() for call in calls]
        once = _elapsed(turn, 1)
        repeats = max(1, round(self.span / max(once, 1e-3)))
        times = sorted(_elapsed(turn, repeats) / len(calls) for _ in range(self.runs))
        return Timing(statistics.median(times), times[0], times[-1], captured is not None)

    def fastest(self, peers: dict[str, Sequence[Call]], graph: bool = True) -> tuple[str, Timing] | None:
        """Name and time of the fastest peer that runs here; None if none does."""
        found = {}
        for name, calls in peers.items():
            try:
                found[name] = self.time(calls, graph)
            except (RuntimeError, NotImplementedError):  # a backend without support for these shapes
                continue
        return min(found.items(), key=lambda item: item[1].median) if found else None


def _rehearsed(calls: Sequence[Call]) -> Timing:
    start = time.perf_counter()
    for call in calls:
        call()
    took = 1000 * (time.perf_counter() - start) / len(calls)
    return Timing(took, took, took, False)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _elapsed(turn: Call, repeats: int) -> float:
    """Milliseconds of `repeats` turns, behind one that warms up."""
    turn()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        turn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


@dataclass(frozen=True)
class Ceilings:
    """What the device did in this run: bytes/s of a copy (read and written), FLOP/s of a bfloat16 matmul."""

    copy: float
    matmul: float


def measure_ceilings(stopwatch: Stopwatch) -> Ceilings:
    size = 64 if stopwatch.rehearses else 8192
    shape = {"dtype": torch.bfloat16, "device": stopwatch.device}
    left, right, out = (torch.randn(size, size, **shape) for _ in range(3))
    matmul = stopwatch.time([lambda: torch.mm(left, right, out=out)])
    source = torch.empty(2**16 if stopwatch.rehearses else 2**31, dtype=torch.uint8, device=stopwatch.device)
    target = torch.empty_like(source)
    copy = stopwatch.time([lambda: target.copy_(source)])
    return Ceilings(copy.per_second(2 * source.numel()), matmul.per_second(2 * size**3))
