"""Peak resident memory of encoding, measured in a process of its own.

`measure_encoding` starts this module as a program, which encodes the documents of a JSON list and prints one
JSON line.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class EncodingMemory:
    """Bytes and seconds of one encoding in a fresh process."""

    tokens: int
    seconds: float
    loaded_bytes: int  # peak before encoding: interpreter, libraries, weights
    peak_bytes: int  # peak at the end, the finished bank included
    bank_bytes: int


def measure_encoding(
    checkpoint: str | Path,
    documents: Sequence[str],
    *,
    batch_tokens: int | None = None,
    dtype: str = "bfloat16",
    threads: int | None = None,
) -> EncodingMemory:
    """Encodes `documents` with the model in folder `checkpoint` in a new process and reads its peak.

    Raises RuntimeError with the process's last words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.json"
        file.write_text(json.dumps(list(documents)), encoding="utf-8")
        arguments = [
            str(checkpoint),
            str(file),
            str(batch_tokens or 0),
            dtype,
            str(threads or torch.get_num_threads()),
        ]
        command = [sys.executable, "-m", "msa_hf.evaluation.peak_memory", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_import_root())
    if done.returncode:
        raise RuntimeError(f"encoding in a process of its own failed:\n{done.stderr.strip()[-2000:]}")
    return EncodingMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far.

    Linux keeps it per address space as VmHWM. Its ru_maxrss would also hold the peak of the process
    that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _import_root() -> str:
    """Where `import msa_hf` finds this very package, installed or not."""
    return str(Path(__file__).resolve().parents[2])


def main(checkpoint: str, documents_file: str, batch_tokens: str, dtype: str, threads: str) -> None:
    """The child: encodes once and prints EncodingMemory as JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import msa_hf  # noqa: F401

    torch.set_num_threads(int(threads))
    documents = json.loads(Path(documents_file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    loaded = peak_resident_bytes()
    start = time.perf_counter()
    memory = model.encode_memory(documents, tokenizer, batch_tokens=int(batch_tokens) or None)
    report = {
        "tokens": int(memory.num_tokens),
        "seconds": time.perf_counter() - start,
        "loaded_bytes": loaded,
        "peak_bytes": peak_resident_bytes(),
        "bank_bytes": int(memory.stats()["vector_bytes"]),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
