"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds

_HELP = {
    "msa_requests_total": ("counter", "Requests by route and HTTP status."),
    "msa_errors_total": ("counter", "Requests that ended with a status of 400 or more."),
    "msa_request_seconds": ("histogram", "Seconds from a request's start to the end of its response."),
    "msa_generations_total": ("counter", "Generations by outcome: finished, cancelled, timed_out, failed."),
    "msa_tokens_total": ("counter", "Tokens read in prompts and written in answers."),
    "msa_documents_changed_total": ("counter", "Documents that were added and deleted."),
    "msa_running": ("gauge", "Generations that run."),
    "msa_waiting": ("gauge", "Requests that wait for their turn."),
    "msa_documents": ("gauge", "Documents in the store."),
}


class Metrics:
    """Counters and a histogram, which any thread may change; gauges are read when they are shown."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, tuple], float] = defaultdict(float)
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = defaultdict(float)

    def count(self, name: str, by: float = 1, **labels: str | int) -> None:
        with self._lock:
            self._counters[name, tuple(labels.items())] += by

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request that has ended."""
        self.count("msa_requests_total", route=route, status=status)
        if status >= 400:
            self.count("msa_errors_total", route=route)
        with self._lock:
            buckets = self._buckets.setdefault(route, [0] * (len(BOUNDS) + 1))
            buckets[next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
            self._sums[route] += seconds

    def render(self, gauges: dict[str, Callable[[], float]]) -> str:
        with self._lock:
            counters, sums = dict(self._counters), dict(self._sums)
            buckets = {route: list(own) for route, own in self._buckets.items()}
        values: dict[str, list[str]] = defaultdict(list)
        for (name, labels), value in sorted(counters.items(), key=repr):
            values[name].append(f"{name}{_labels(dict(labels))} {value:g}")
        for name, gauge in gauges.items():
            values[name].append(f"{name} {gauge():g}")
        name = "msa_request_seconds"
        for route, own in sorted(buckets.items()):
            passed = 0
            for bound, number in zip((*map(str, BOUNDS), "+Inf"), own):
                passed += number
                values[name].append(f"{name}_bucket{_labels({'route': route, 'le': bound})} {passed}")
            values[name].append(f"{name}_sum{_labels({'route': route})} {sums[route]:.6f}")
            values[name].append(f"{name}_count{_labels({'route': route})} {passed}")
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *values[name]]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, object]) -> str:
    own = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{own}}}" if own else ""
