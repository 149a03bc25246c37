"""What a MemoryStore costs: bytes, routing, editing and opening, on the standing benchmark and a larger copy.

Vectors are real: the benchmark's memory goes into a store in 4 bits and into one as it is, and several times
under new names into a large one, which is then edited, opened and searched. Started as a program, this module
searches a store in a process of its own and prints what that took.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from msa_hf.evaluation import metrics
from msa_hf.evaluation.environment import Environment, describe_environment
from msa_hf.evaluation.hotpotqa import HotpotQA
from msa_hf.evaluation.metrics import Estimate
from msa_hf.evaluation.peak_memory import _import_root, peak_resident_bytes
from msa_hf.modeling.memory_bank import MemoryBank
from msa_hf.store import MemoryStore

EDITED = ("add", "update", "delete", "undo")


@dataclass(frozen=True)
class SearchCost:
    """Searches by routers in a fresh process: seconds of each, and resident bytes before and at the peak."""

    router_chunks: int
    seconds: list[float]
    loaded_bytes: int
    peak_bytes: int
    largest_segment: int


@dataclass(frozen=True)
class StoreReport:
    """Bytes, seconds and losses of stores; `written` are the bytes that one edit hands to the system."""

    environment: Environment
    questions: int
    recall: dict[str, Estimate]
    recall_difference: Estimate
    equal_selections: bool
    vector_bytes: dict[str, int]
    folder_bytes: dict[str, int]
    large_documents: int
    large_bytes: int
    written: dict[str, list[int]]
    edit_seconds: dict[str, list[float]]
    open_seconds: list[float]
    bank_seconds: list[float]
    search: SearchCost

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_store(
    model: Any,
    tokenizer: Any,
    benchmark: HotpotQA,
    memory: MemoryBank,
    checkpoint: str | Path,
    *,
    large_documents: int = 100_000,
    edits: int = 5,
    folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> StoreReport:
    """Measures stores of the benchmark's memory.

    Args:
        memory: the benchmark's documents, dense. checkpoint: folder of the model, for another process.
        large_documents: of the large store. edits: of each kind. folder: for stores; default temporary.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place = Path(place)
        progress("stores of the benchmark")
        stores = {}
        for name, bits in (("4 bits", 4), ("dense", None)):
            path = place / name.replace(" ", "-")
            with MemoryStore.create(
                path, model, tokenizer, key_bits=bits, value_bits=bits, router_bits=bits
            ) as store:
                store.add_bank(memory, _names(0, len(memory)))
                store.compact()
                stores[name] = (path, store.stats()["vector_bytes"])
        progress("recall")
        rankings = {"dense bank": _rankings(model, tokenizer, benchmark, memory)}
        with MemoryStore.open(stores["4 bits"][0], model, tokenizer, read_only=True) as store:
            rankings["4 bits, store"] = _rankings(model, tokenizer, benchmark, store.bank())
            packed = _rankings(model, tokenizer, benchmark, store.coding.pack(memory))
        scores = {name: metrics.recall_at(found, benchmark.gold, 16) for name, found in rankings.items()}
        sizes = {name: _folder_bytes(path) for name, (path, _) in stores.items()}
        shutil.rmtree(stores["dense"][0])
        progress(f"a store of {large_documents:,} documents")
        large = place / "large"
        _fill(large, model, tokenizer, memory, large_documents)
        total = _folder_bytes(large)
        progress("edits")
        written, seconds = _edit(large, model, tokenizer, memory.documents, edits)
        opened, read = _open(large, edits)
        progress("search")
        search = measure_search(checkpoint, large, benchmark.questions[:5])
        return StoreReport(
            environment=describe_environment(model.device),
            questions=len(benchmark),
            recall={name: metrics.bootstrap(values) for name, values in scores.items()},
            recall_difference=metrics.paired_difference(scores["4 bits, store"], scores["dense bank"]),
            equal_selections=rankings["4 bits, store"] == packed,
            vector_bytes={name: size for name, (_, size) in stores.items()},
            folder_bytes=sizes,
            large_documents=large_documents,
            large_bytes=total,
            written=written,
            edit_seconds=seconds,
            open_seconds=opened,
            bank_seconds=read,
            search=search,
        )


def measure_search(checkpoint: str | Path, store: Path, questions: Sequence[str]) -> SearchCost:
    """Searches the store by routers alone, in a new process. Raises RuntimeError with its last words."""
    arguments = [str(checkpoint), str(store), json.dumps(list(questions))]
    command = [sys.executable, "-m", "msa_hf.evaluation.store_costs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_import_root())
    if done.returncode:
        raise RuntimeError(f"searching in a process of its own failed:\n{done.stderr.strip()[-2000:]}")
    return SearchCost(**json.loads(done.stdout.strip().splitlines()[-1]))


def render(report: StoreReport) -> str:
    """The report as text."""
    lines = [f"store, {report.environment}", f"{report.questions:,} questions, routers alone, recall@16:"]
    lines += [f"  {name:16} {estimate}" for name, estimate in report.recall.items()]
    same = "the same selections as" if report.equal_selections else "OTHER SELECTIONS THAN"
    lines.append(f"  difference       {report.recall_difference}; {same} the packed bank")
    for what, sizes in (("vectors", report.vector_bytes), ("folder", report.folder_bytes)):
        share = sizes["4 bits"] / sizes["dense"]
        lines.append(f"{what}: 4 bits {sizes['4 bits']:,} bytes, dense {sizes['dense']:,}: {share:.3f}")
    lines.append(f"a store of {report.large_documents:,} documents, {report.large_bytes:,} bytes:")
    for name in EDITED:
        most = max(report.written[name]) / report.large_bytes
        lines.append(
            f"  {name:7} {median(report.edit_seconds[name]):.3f} s, writes "
            f"{median(report.written[name]):,.0f} bytes, at most {most:.4%} of the store"
        )
    lines.append(f"  open    {_spread(report.open_seconds)}, then its bank {_spread(report.bank_seconds)}")
    search = report.search
    above = search.peak_bytes - search.loaded_bytes
    lines.append(
        f"  search  {_spread(search.seconds)} over {search.router_chunks:,} router chunks per layer; "
        f"{above / 2**20:,.0f} MiB above the loaded model, peak {search.peak_bytes / 2**20:,.0f} MiB; "
        f"largest segment {search.largest_segment / 2**20:,.0f} MiB"
    )
    return "\n".join(lines)


def _names(copy: int, documents: int) -> list[str]:
    return [f"{copy}-{number}" for number in range(documents)]


def _rankings(model: Any, tokenizer: Any, benchmark: HotpotQA, bank: MemoryBank) -> list[list[int]]:
    found = []
    for question in benchmark.questions:
        ranked = model.rank_documents([question], bank, k=16, mode="router", tokenizer=tokenizer)[0]
        found.append([document.id for document in ranked])
    return found


def _fill(path: Path, model: Any, tokenizer: Any, memory: MemoryBank, documents: int) -> None:
    """The memory several times, under new names, until there are so many documents."""
    with MemoryStore.create(path, model, tokenizer) as store:
        copy = 0
        while (left := documents - len(store)) > 0:
            part = memory if left >= len(memory) else _first(memory, left)
            store.add_bank(part, _names(copy, len(part)))
            copy += 1


def _first(memory: MemoryBank, documents: int) -> MemoryBank:
    """The first documents of a dense bank."""
    from dataclasses import replace

    from msa_hf.modeling.memory_bank import DenseVectors, LayerMemory

    counts = memory.token_counts[:documents]
    chunks = int(memory.chunk_counts[:documents].sum())
    router_chunks = int(memory.router_chunk_counts[:documents].sum())
    layers = {
        layer: LayerMemory(
            DenseVectors(own.keys.data[:chunks]),
            DenseVectors(own.values.data[:chunks]),
            DenseVectors(own.router_keys.data[:router_chunks]),
        )
        for layer, own in memory.layers.items()
    }
    return replace(memory, documents=list(memory.documents[:documents]), token_counts=counts, layers=layers)


def _edit(
    path: Path, model: Any, tokenizer: Any, texts: Sequence[str], edits: int
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Bytes written and seconds of edits of one document each, checkpoints of the database included."""
    written: dict[str, list[int]] = {name: [] for name in EDITED}
    seconds: dict[str, list[float]] = {name: [] for name in EDITED}
    with MemoryStore.open(path, model, tokenizer) as store:
        for number in range(edits):
            steps = {
                "add": lambda: store.add([f"New {number}\n{texts[number]}"], [f"new-{number}"]),  # noqa: B023
                "update": lambda: store.update(f"0-{number}", f"Changed\n{texts[number + 1]}"),  # noqa: B023
                "delete": lambda: store.delete(f"0-{number + edits}"),  # noqa: B023
                "undo": lambda: store.undo(),
            }
            for name, step in steps.items():
                before, start = _bytes_written(), time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
                written[name].append(_bytes_written() - before)
    return written, seconds


def _open(path: Path, times: int) -> tuple[list[float], list[float]]:
    """Seconds to open a store, and to get its bank."""
    opened, read = [], []
    for _ in range(times):
        start = time.perf_counter()
        with MemoryStore.open(path, read_only=True) as store:
            opened.append(time.perf_counter() - start)
            start = time.perf_counter()
            store.bank("*")
            read.append(time.perf_counter() - start)
    return opened, read


def _bytes_written() -> int:
    """Bytes that this process has handed to write calls (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]"


def main(checkpoint: str, folder: str, questions: str) -> None:
    """The process that searches: prints SearchCost as JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with MemoryStore.open(folder, read_only=True) as store:
        dtype = getattr(torch, store.provenance.dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    loaded, seconds = peak_resident_bytes(), []
    with MemoryStore.open(folder, model, tokenizer, read_only=True) as store:
        bank = store.bank()
        for question in json.loads(questions):
            start = time.perf_counter()
            store.search(question, k=16, mode="router")
            seconds.append(time.perf_counter() - start)
        segments = [path.stat().st_size for path in (store.path / "segments").iterdir()]
        cost = SearchCost(
            int(bank.router_chunk_counts.sum()), seconds, loaded, peak_resident_bytes(), int(np.max(segments))
        )
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main(*sys.argv[1:])
