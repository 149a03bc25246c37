"""Compiles every kernel for GPUs that need not be there, and says what came out.

    python kernels/benchmarks/compile_ahead.py > kernels/COMPILED.md
    python kernels/benchmarks/compile_ahead.py --quick --json

Ends with status 1, and the reasons on stderr, if a kernel for CUDA does not compile, moves registers to local
memory or needs more shared memory than there is, or if attention or routing do without tensor cores. For AMD
the figures are only reported.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # msa_hf of this checkout

import torch  # noqa: E402
import triton  # noqa: E402
from compiled_kernels import TARGETS, MachineCode, compiling  # noqa: E402
from operands import Attention, Bits, Encoding, Gathering, Pooling, Ranking, Routing, attention_calls  # noqa: E402

from msa_hf import kernels  # noqa: E402
from msa_hf.kernels import launch  # noqa: E402

WITH_TENSOR_CORES = ("decode_attention", "prefill_attention", "route_scores")
WIDTHS = ((4, 4), (4, 3), (3, 3), (2, 2), (1, 1))
# The preset "2.7bit", and parts as narrow and as wide in bits as calibrations choose, by head dim.
PARTS = {
    64: (((8, 6), (56, 2)), ((8, 5), (56, 1))),
    128: (((32, 4), (96, 2)), ((32, 3), (96, 2))),
    256: (((64, 4), (192, 2)), ((64, 3), (192, 2))),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448}  # bytes that a program can have
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One launch of an operator: `run` calls it with tensors of the right types and sizes. The quick ones
    are what the tests compile."""

    operator: str
    label: str
    run: Callable[[], None]
    quick: bool = False


@dataclass
class Row:
    operator: str
    label: str
    code: MachineCode

    def failures(self) -> Iterator[str]:
        if self.code.spills and not self.code.target.startswith("gfx"):
            yield f"{self} spills: {self.code.spills} instructions, {self.code.registers} registers"
        if self.code.shared > SHARED.get(self.code.target, self.code.shared):
            yield f"{self} needs {self.code.shared:,} bytes of shared memory"

    def __str__(self) -> str:
        return f"{self.operator} ({self.label}), {self.code.kernel} for {self.code.target}"


def cases() -> list[Case]:
    """Of the operators that exist."""
    found = [
        _attention_case(operator, dim, bits)
        for operator in ("decode_attention", "prefill_attention")
        for dim in (64, 128, 256)
        for bits in (*WIDTHS, PARTS[dim])
    ]
    found += [
        _attention_case(
            "decode_attention", 128, (4, 4), "16 bit scales, no means", scale_bits=16, mean_group=0
        ),
        _attention_case("decode_attention", 96, (4, 4), "float16", dtype=torch.float16),
    ]
    found += [
        _encode_case(dim, bits, dim == 128 and bits == (4, 4)) for dim in (64, 128, 256) for bits in WIDTHS
    ]
    found += [
        _route_case(dim, bits, dim == 128 and bits in (0, 4)) for dim in (64, 128) for bits in (0, 1, 2, 3, 4)
    ]
    found += [_rank_case(operator) for operator in ("document_maxima", "document_means", "top_documents")]
    found += [_pool_case(dim) for dim in (64, 128)]
    found += [_gather_case(dim, bits) for dim in (64, 128) for bits in (0, 2, 3, 4)]
    return [case for case in found if case.operator in kernels.available]


def _attention_case(operator: str, dim: int, bits: tuple[Bits, Bits], note: str = "", **changes) -> Case:
    queries = 1 if operator == "decode_attention" else 128
    shape = Attention(
        heads=8,
        groups=2,
        queries=queries,
        packed=1024,
        dim=dim,
        bits=(bits,),
        recent=queries + 160,
        **changes,
    )

    def run() -> None:
        query, out = shape.query(CPU), torch.empty(1, queries, 8, dim, dtype=shape.dtype)
        for arguments in attention_calls(shape.view(CPU), query, out):
            getattr(kernels, operator)(**arguments)

    widths = (own if isinstance(own, int) else "+".join(f"{w}x{b}" for w, b in own) for own in bits)
    label = "D {}, K {} V {} bits".format(dim, *widths) + (f", {note}" if note else "")
    return Case(operator, label, run, quick=dim == 128 and bits == (4, 4) and not note)


def _encode_case(dim: int, bits: tuple[int, int], quick: bool) -> Case:
    shape = Encoding(groups=2, tokens=512, dim=dim, bits=bits)

    def run() -> None:
        kernels.encode(**shape.arguments(*shape.states(CPU)))

    return Case("encode_states", f"D {dim}, K {bits[0]} V {bits[1]} bits, search 9", run, quick)


def _route_case(dim: int, bits: int, quick: bool) -> Case:
    shape = Routing(dim=dim, bits=bits)

    def run() -> None:
        kernels.route_scores(**shape.arguments(CPU))

    keys = f"{bits} bits" if bits else "bfloat16"
    return Case("route_scores", f"G 8, D {dim}, {keys}, 32 question tokens", run, quick)


def _gather_case(dim: int, bits: int) -> Case:
    shape = Gathering(samples=2, places=64, chunks=256, dim=dim, bits=bits)

    def run() -> None:
        getattr(kernels, shape.operator)(**shape.arguments(CPU))

    label = f"G 8, D {dim}, {f'{bits} bits' if bits else 'bfloat16'}"
    return Case(shape.operator, label, run, quick=dim == 128 and bits in (0, 4))


def _pool_case(dim: int) -> Case:
    shape = Pooling(documents=2, tokens=256, dim=dim)

    def run() -> None:
        kernels.pool_chunks(**shape.arguments(CPU))

    return Case("pool_chunks", f"G 8, D {dim}, chunks of 64", run, quick=dim == 128)


def _rank_case(operator: str) -> Case:
    shape = Ranking(chunks=10_000, documents=5_000)

    def run() -> None:
        arguments = shape.arguments(CPU)
        if operator == "top_documents":
            arguments = {"scores": arguments["chunk_scores"], "k": shape.best}
        getattr(kernels, operator)(**arguments)

    return Case(
        operator, f"{shape.best} best" if operator == "top_documents" else "1 question", run, quick=True
    )


def compiled(case: Case, target: str) -> tuple[list[Row], str]:
    """The kernels that a case launches on a target, and why there are no more of them, or ""."""
    reason = ""
    with ExitStack() as stack:
        if TARGETS[target].backend == "cuda":
            stack.enter_context(launch.assume_capability(divmod(TARGETS[target].arch, 10)))
        found = stack.enter_context(compiling(target))
        try:
            case.run()
        except triton.TritonError as error:
            reason = f"{case.operator} ({case.label}) does not compile for {target}: {_root(error)}"
    return [Row(case.operator, case.label, code) for code in found], reason


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def failures(rows: list[Row]) -> list[str]:
    """Why the rows cannot be shipped."""
    found = [reason for row in rows for reason in row.failures()]
    calls: dict[tuple[str, str, str], bool] = {}
    for row in rows:
        if row.operator in WITH_TENSOR_CORES:
            call = (row.operator, row.label, row.code.target)
            calls[call] = calls.get(call, False) or bool(row.code.tensor_cores)
    return found + [f"{' '.join(call)} uses no tensor cores" for call, used in calls.items() if not used]


def table(rows: list[Row]) -> str:
    """Markdown, each distinct kernel once."""
    lines = [
        "# Compiled kernels",
        "",
        f"What Triton {triton.__version__} makes of the kernels at the shipped launch parameters, each "
        "distinct kernel once: `python kernels/benchmarks/compile_ahead.py > kernels/COMPILED.md`. Nothing "
        "here was run. Spills are instructions (AMD: registers) that move registers to local memory; "
        "instructions are those of the kernel, and of its innermost loop with most tensor-core instructions.",
        "",
        "| operator | case | kernel | target | warps, stages | registers | spills | shared bytes "
        "| tensor cores | instructions, loop |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for row in rows:
        code = row.code
        if code.digest in seen:
            continue
        seen.add(code.digest)
        used = ", ".join(f"{count} {name}" for name, count in code.tensor_cores.items()) or "-"
        lines.append(
            f"| {row.operator} | {row.label} | {code.kernel} | {code.target} | {code.warps}, {code.stages} "
            f"| {code.registers} | {code.spills} | {code.shared:,} | {used} "
            f"| {code.instructions:,}, {code.loop:,} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case of each operator, as in the tests")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--operator", help="only this one")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    rows, reasons = [], []
    for target in options.targets:
        for case in cases():
            if (case.quick or not options.quick) and options.operator in (None, case.operator):
                found, reason = compiled(case, target)
                rows += found
                reasons += [reason] if reason else []
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows))
    print("\n".join(reasons + failures(rows)), file=sys.stderr)
    return 1 if failures(rows) or any("for gfx" not in reason for reason in reasons) else 0


if __name__ == "__main__":
    sys.exit(main())
