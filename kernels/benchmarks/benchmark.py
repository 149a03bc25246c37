"""Verifies every kernel against plain PyTorch, then times it against its peers on the GPU at hand.

    python kernels/benchmarks/benchmark.py --json results.json   # all of it, under eight minutes on an H200
    python kernels/benchmarks/benchmark.py --only decode route   # some of it
    python kernels/benchmarks/benchmark.py --interpret           # tiny shapes on a CPU: a rehearsal

Kernel times are those of CUDA graphs over several buffers, larger together than the cache of the device;
ratios are to the fastest peer that runs. Copy and matmul are measured in the same run. Ends with status 1 if
a kernel disagrees with its twin.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # msa_hf of this checkout
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch  # noqa: E402
import triton  # noqa: E402
from measurements import MEASUREMENTS, Result, Session  # noqa: E402

from msa_hf import kernels  # noqa: E402
from msa_hf.evaluation.environment import describe_environment  # noqa: E402
from msa_hf.modeling import ops  # noqa: E402


def table(results: list[Result], session: Session) -> str:
    """Markdown: one row per measurement, then the bars."""
    ceilings = session.ceilings
    lines = [
        f"{describe_environment(session.device)}, triton {triton.__version__}; "
        f"backend: {': '.join(ops.backend(session.device))}; kernels: {', '.join(kernels.available)}",
        "",
    ]
    if session.rehearses:
        lines += ["A rehearsal with tiny shapes: only the errors mean anything.", ""]
    else:
        copied, multiplied = ceilings.copy / 1e12, ceilings.matmul / 1e12
        lines += [f"Copy {copied:.2f} TB/s, bfloat16 matmul {multiplied:.0f} TFLOP/s.", ""]
    lines += ["| case | error | ms (low-high) | of copy | of matmul | against |", "|---|---|---|---|---|---|"]
    lines += [result.row(ceilings, session.rehearses) for result in results]
    bars = [bar for result in results for bar in result.bars]
    if bars and not session.rehearses:
        lines += ["", "| bar | measured | wanted | |", "|---|---|---|---|"]
        lines += [str(bar) for bar in bars]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--interpret", action="store_true", help="rehearse under Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    device = torch.device("cpu" if options.interpret else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --interpret rehearses on a CPU")
    session = Session(device)
    results = []
    for name in options.only:
        for result in MEASUREMENTS[name](session):
            results.append(result)
            print(f"{result.name}: {result.summary()}", file=sys.stderr, flush=True)
    print(table(results, session))
    if options.json:
        report = {
            "environment": vars(describe_environment(device)) | {"triton": triton.__version__},
            "rehearsal": session.rehearses,
            "backend": ops.backend(device),
            "ceilings": vars(session.ceilings),
            "results": [result.to_dict(session.ceilings) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [result.name for result in results if not result.right]
    if wrong:
        print(f"wrong, and not timed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
