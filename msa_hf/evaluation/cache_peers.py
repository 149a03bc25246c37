"""The peers of a quantised cache, measured in the same run: each in a process of its own Python environment.

They get the model's folder, the token ids and the dense logits, and hand back what our own systems are
measured by. A peer that does not install, or fails, is reported with the reason instead of figures.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msa_hf.evaluation.cache_environments import PEERS, PeerPackage, peer_python
from msa_hf.evaluation.cache_protocol import Divergence
from msa_hf.evaluation.cache_quality import Protocol
from msa_hf.evaluation.decode_speed import SpeedRatio
from msa_hf.modeling.errors import DataUnavailableError

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("cache_peer_program.py")


@dataclass(frozen=True)
class PeerRun:
    """What one peer gave at one width, or why there is nothing."""

    name: str
    requirement: str
    transformers: str | None = None
    bits: float | None = None
    quality: list[Divergence] | None = None
    speed: list[SpeedRatio] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class PeerTask:
    """What all peers do: texts with dense logits for "quality", a long text for "speed"."""

    model: Path
    texts: Sequence[Sequence[int]] = ()
    dense: Path | None = None
    protocol: Protocol = Protocol()
    long: Sequence[int] = ()
    contexts: Sequence[int] = ()
    groups: int = 24
    steps: int = 8

    @property
    def parts(self) -> list[str]:
        return [name for name, wanted in (("quality", self.texts), ("speed", self.contexts)) if wanted]


def run_peers(task: PeerTask, peers: Iterable[PeerPackage] = PEERS) -> Iterator[PeerRun]:
    """One run per peer and width, the widest first."""
    for peer in peers:
        for bits in peer.bits:
            yield _run(peer, bits, task)


def _run(peer: PeerPackage, bits: int, task: PeerTask) -> PeerRun:
    name = f"{peer.name} {bits} bit"
    requirement = " ".join([*peer.alone, *peer.requirements][:1])
    try:
        result = _measure(peer_python(peer), _job(peer, bits, task))
    except (DataUnavailableError, RuntimeError) as error:
        logger.warning("%s: %s", name, error)
        return PeerRun(name, requirement, reason=str(error))
    return PeerRun(
        name,
        requirement,
        result["transformers"],
        result.get("bits"),
        [Divergence(**row) for row in result["quality"]] if "quality" in result else None,
        [SpeedRatio(**row) for row in result["speed"]] if "speed" in result else None,
    )


def _job(peer: PeerPackage, bits: int, task: PeerTask) -> dict[str, Any]:
    return {
        "peer": peer.name,
        "bits": bits,
        "parts": task.parts,
        "model": str(task.model),
        "threads": torch.get_num_threads(),
        "texts": [list(ids) for ids in task.texts],
        "dense": str(task.dense),
        "prefill": task.protocol.prefill,
        "decoded": task.protocol.decoded,
        "block": task.protocol.block,
        "long": list(task.long),
        "contexts": list(task.contexts),
        "groups": task.groups,
        "steps": task.steps,
    }


def _measure(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Runs the program. Raises RuntimeError with its last words."""
    # Nothing of this process's Python may leak into the peer's.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(_PROGRAM), str(file)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder, env=environment
        )
    if done.returncode or not done.stdout.strip():
        words = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"]
        raise RuntimeError(words[-1][:300])
    return json.loads(done.stdout.strip().splitlines()[-1])
