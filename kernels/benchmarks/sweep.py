"""Looks for launch parameters that are faster on the GPU at hand than those of msa_hf.kernels.launch.

    python kernels/benchmarks/sweep.py
    python kernels/benchmarks/sweep.py --only decode_attention

One parameter at a time is halved or doubled, as long as that helps. A line of JSON for each workload.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # msa_hf of this checkout

import torch  # noqa: E402
from measurements import attention_sets, run_all  # noqa: E402
from operands import Attention, Encoding, Routing  # noqa: E402
from timing import Call, Stopwatch  # noqa: E402

from msa_hf import kernels  # noqa: E402
from msa_hf.kernels import launch  # noqa: E402

LEAST, MOST = {"num_warps": 1, "num_stages": 1}, {"num_warps": 16, "num_stages": 6}
WORTH = 0.98  # of the time before


def attention(operator: str, shape: Attention, stopwatch: Stopwatch) -> list[Call]:
    run = getattr(kernels, operator)
    return [partial(run_all, run, calls) for calls in attention_sets(shape, stopwatch)]


def encoding(shape: Encoding, stopwatch: Stopwatch) -> list[Call]:
    seeds = range(stopwatch.buffers(shape.nbytes))
    return [
        partial(kernels.encode, **shape.arguments(*shape.states(stopwatch.device, seed))) for seed in seeds
    ]


def routing(shape: Routing, stopwatch: Stopwatch) -> list[Call]:
    return [partial(kernels.route_scores, **shape.arguments(stopwatch.device))]


def _decode(batch: int, context: int, bits: tuple[int, int]) -> Callable[[Stopwatch], list[Call]]:
    return partial(attention, "decode_attention", Attention(batch, packed=context * 1024, bits=(bits,)))


# kernel of launch.PARAMETERS -> workload -> what makes its calls
WORKLOADS: dict[str, dict[str, Callable[[Stopwatch], list[Call]]]] = {
    "decode_attention": {
        f"{batch} x {context}k, {bits[0]}/{bits[1]} bits": _decode(batch, context, bits)
        for batch, context, bits in (
            (1, 32, (4, 4)), (1, 128, (4, 4)), (32, 32, (4, 4)),
            (1, 128, (3, 3)), (1, 128, (3, 2)), (1, 128, (2, 2)),
        )
    },
    "combine_splits": {"1 x 32k": _decode(1, 32, (4, 4)), "32 x 32k": _decode(32, 32, (4, 4))},
    "prefill_attention": {
        "512 behind 32k": partial(
            attention, "prefill_attention", Attention(packed=32768, queries=512, recent=672)
        )
    },
    "route_packed": {"1,562,500 chunks, 4 bits": partial(routing, Routing(chunks=1_562_500))},
    "route_dense": {"1,562,500 chunks": partial(routing, Routing(chunks=1_562_500, bits=0))},
    "encode": {"1 x 32k, search 9": partial(encoding, Encoding(tokens=32768))},
}  # fmt: skip


def best_parameters(kernel: str, calls: list[Call], stopwatch: Stopwatch) -> dict:
    """The best parameters found for a kernel, and milliseconds before and after."""
    best = launch.launch_parameters(kernel, stopwatch.device)
    before = fastest = _time(kernel, best, calls, stopwatch)
    tried, improved = [best], True
    while improved:
        improved = False
        for name in best:
            for value in (best[name] * 2, best[name] // 2):
                candidate = best | {name: value}
                fits = LEAST.get(name, 16) <= value <= MOST.get(name, 1024)
                if not fits or candidate in tried:
                    continue
                tried.append(candidate)
                took = _time(kernel, candidate, calls, stopwatch)
                if took < WORTH * fastest:
                    best, fastest, improved = candidate, took, True
    return {"parameters": best, "before_ms": before, "after_ms": fastest, "tried": len(tried)}


def _time(kernel: str, parameters: dict[str, int], calls: list[Call], stopwatch: Stopwatch) -> float:
    """Infinite for parameters that do not compile or do not fit on the device."""
    with mock.patch.dict(launch.PARAMETERS, {kernel: {(0, 0): parameters}}):
        try:
            return stopwatch.time(calls).median
        except Exception as error:  # Triton has many kinds of errors for what a device cannot hold
            print(f"{kernel} {parameters}: {type(error).__name__}", file=sys.stderr)
            return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    stopwatch = Stopwatch(torch.device("cuda"), span=20.0)
    for kernel in options.only:
        for workload, make in WORKLOADS[kernel].items():
            found = best_parameters(kernel, make(stopwatch), stopwatch)
            print(json.dumps({"kernel": kernel, "workload": workload} | found), flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
