"""Environments of the peers that quantised caches are compared with: pinned, made once, one per package.

Two of them install the same top-level module, one wants another Python than most of us have, and none may
ever become a dependency: so each lives in a virtual environment of its own beside the fetched wheels, with
the very torch and Transformers of this process unless it is too old for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from msa_hf.modeling.errors import DataUnavailableError
from msa_hf.packages import cache_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerPackage:
    """One PyPI package with a quantised cache for Transformers.

    `requirements` are installed with their dependencies, `alone` without, and whatever Python they ask for.
    `transformers` is the version it was written for, None: the one of this process. `bits` are the widths
    that it offers and that are measured.
    """

    name: str
    requirements: tuple[str, ...]
    bits: tuple[int, ...]
    alone: tuple[str, ...] = ()
    transformers: str | None = None


PEERS = (
    PeerPackage("hqq", ("hqq==0.2.8.post1",), (4, 3, 2)),
    PeerPackage("quanto", ("optimum-quanto==0.2.7",), (4, 2)),
    PeerPackage("turbokv", ("scipy==1.17.1",), (4, 2), alone=("turbokv==0.1.0",)),
    PeerPackage("turboquant", ("scipy==1.17.1", "numpy==1.26.4"), (4, 3, 2), alone=("turboquant==0.2.0",)),
    PeerPackage("turboquant-vllm", ("scipy==1.17.1",), (4, 3, 2), alone=("turboquant-vllm==1.5.0",)),
    PeerPackage(
        "turboquant-kv",
        ("scipy==1.17.1", "triton==3.9.0"),
        (4, 3, 2),
        alone=("turboquant-kv==1.0.0",),
        transformers="5.3.0",
    ),
)

# What else the index holds, and why it is no peer.
NO_PEERS = {
    "turboquant-torch": "its cache keeps dense tensors and offers a lossy round trip on demand",
    "turboquant-hf": "its KV cache is no Transformers cache: it cannot be passed to a model",
    "polarquant": "its KV cache is no Transformers cache: it cannot be passed to a model",
    "turboquant-gpu": "GPU only, and no Transformers cache",
    "tqkv": "for vLLM only",
    "turboquant-py": "no KV cache",
    "kvquant": "an empty package",
}


def peer_python(peer: PeerPackage, cache: str | Path | None = None) -> Path:
    """Python of a peer's environment, which is made if it is not there.

    Raises DataUnavailableError with pip's reason where it cannot be installed; a failed installation leaves
    nothing that looks complete.
    """
    steps = _steps(peer)
    digest = hashlib.sha256(json.dumps([steps, sys.version]).encode()).hexdigest()[:12]
    folder = cache_folder(cache) / "peers" / f"{peer.name}-{digest}"
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    complete = folder / "installed.json"
    if complete.is_file():
        return python
    logger.info("installing %s into %s", peer.name, folder)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for step in steps:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
            raise DataUnavailableError(f"{peer.name} does not install: {lines[-1].strip()}")
    complete.write_text(json.dumps(steps), encoding="utf-8")
    return python


def _steps(peer: PeerPackage) -> list[list[str]]:
    """Arguments of the pip calls, in order."""
    host = peer.transformers or transformers.__version__
    common = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={host}", "numpy", "setuptools"]
    steps = [common, list(peer.requirements)]
    if peer.alone:
        steps.append(["--no-deps", "--ignore-requires-python", *peer.alone])
    return steps
