"""The benchmark of quantised caches: every part that is asked for, our systems and their peers in one run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_hf.evaluation.cache_environments import PEERS, PeerPackage
from msa_hf.evaluation.cache_evaluation import CacheEvaluation, compare_with_peers
from msa_hf.evaluation.cache_length import LONG_PROTOCOL, LengthQuality, measure_length
from msa_hf.evaluation.cache_mmlu import MmluScore, load_subjects, measure_mmlu, summarize_mmlu
from msa_hf.evaluation.cache_models import load_causal_model, model_folder
from msa_hf.evaluation.cache_needle import (
    LENGTHS,
    NeedleScore,
    haystacks,
    measure_needle,
    summarize_needle,
)
from msa_hf.evaluation.cache_peers import PeerRun, PeerTask, run_peers
from msa_hf.evaluation.cache_quality import (
    CacheQuality,
    Protocol,
    measure_bits,
    measure_quality,
    measured_states,
    save_dense_logits,
    summarize_quality,
)
from msa_hf.evaluation.cache_speed import (
    CONTEXTS,
    HELD_TOKENS,
    CacheBytes,
    measure_bytes,
    measure_speed,
    speed_tokens,
)
from msa_hf.evaluation.cache_systems import CacheSystem, dense_system
from msa_hf.evaluation.cache_texts import benchmark_texts, long_texts, tokenize, tokenize_long
from msa_hf.evaluation.decode_speed import SpeedRatio
from msa_hf.evaluation.environment import describe_environment

logger = logging.getLogger(__name__)

PARTS = ("quality", "bytes", "length", "needle", "mmlu", "speed")
MMLU_SUBJECTS = 57


@dataclass(frozen=True)
class CacheTask:
    """What is measured and how much of it.

    `texts` of the nine for quality, `long_texts` for length and `needle_texts` per length; MMLU `questions`
    in all, without the first `skip_questions` of every subject; bytes are counted at `held_tokens`; after
    each of `contexts`, `groups` of `steps` single tokens are timed.
    """

    parts: tuple[str, ...] = ("quality", "bytes")
    texts: int = 9
    long_texts: int = 4
    needle_lengths: tuple[int, ...] = LENGTHS
    needle_texts: int = 3
    questions: int = 6 * MMLU_SUBJECTS
    skip_questions: int = 0
    held_tokens: tuple[int, ...] = HELD_TOKENS
    contexts: tuple[int, ...] = CONTEXTS
    groups: int = 24
    steps: int = 8
    protocol: Protocol = Protocol()
    length_protocol: Protocol = LONG_PROTOCOL

    def __post_init__(self):
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts must be among {', '.join(PARTS)}; got {', '.join(unknown) or 'none'}")


def evaluate_cache(
    name: str,
    systems: Sequence[CacheSystem],
    task: CacheTask = CacheTask(),
    *,
    peers: Iterable[PeerPackage] = (),
    dtype: str = "float32",
    device: str | None = None,
) -> Iterator[CacheEvaluation]:
    """Measures `systems`, and `peers`, with the model `name`: a folder, or one that `cache_models` packages.

    Yields the report so far after every part and every peer; the last one is whole.

    Raises DataUnavailableError for an unknown model or data that cannot be had, ValueError for texts that are
    too short.
    """
    folder = model_folder(name)
    model, tokenizer = load_causal_model(folder, dtype, device)
    results: dict[str, Any] = {}
    runs: list[PeerRun] = []

    def report() -> CacheEvaluation:
        return CacheEvaluation(
            model=str(name),
            dtype=str(model.dtype).removeprefix("torch."),
            systems=[system.name for system in systems],
            texts=task.texts,
            protocol=task.protocol,
            comparisons=compare_with_peers(results.get("quality", [])),
            missing={run.name: run.reason for run in runs if run.reason},
            requirements={run.name: run.requirement for run in runs},
            environment=describe_environment(model.device),
            **results,
        )

    with tempfile.TemporaryDirectory(prefix="msa-hf-cache-") as temporary:
        run = _Run(model, tokenizer, list(systems), task, Path(temporary))
        for part in PARTS:
            if part in task.parts:
                logger.info("measuring %s", part)
                results[part] = getattr(run, part)()
                yield report()
        if peers := list(peers):
            for peer_run in run_peers(run.peer_task(folder), peers):
                runs.append(peer_run)
                results |= _peer_results(results, peer_run)
                yield report()


def all_peers() -> tuple[PeerPackage, ...]:
    """Every peer that is known."""
    return PEERS


@dataclass(frozen=True)
class _Run:
    """The parts of one run, which share a model; `dense` is a folder for the logits of the dense cache."""

    model: Any
    tokenizer: Any
    systems: list[CacheSystem]
    task: CacheTask
    dense: Path

    def quality(self) -> list[CacheQuality]:
        rows, protocol = self.quality_rows(), self.task.protocol
        save_dense_logits(self.model, rows, self.dense, protocol)
        states = measured_states(self.model, rows[0], protocol)
        results = []
        for system in self.systems:
            logger.info("quality of %s", system.name)
            divergences = measure_quality(self.model, system, rows, self.dense, protocol)
            bits = measure_bits(self.model, system, states, protocol)
            results.append(summarize_quality(system.name, bits, divergences))
        return results

    def quality_rows(self) -> list[list[int]]:
        texts = benchmark_texts()
        if self.task.texts < len(texts):
            # The source code stays in, unless there is but one text.
            texts = [*texts[: self.task.texts - 1], texts[-1]] if self.task.texts > 1 else texts[:1]
        return tokenize(self.tokenizer, texts, self.task.protocol.length)

    def bytes(self) -> list[CacheBytes]:
        return measure_bytes(self.model, self.systems, self.task.held_tokens)

    def length(self) -> list[LengthQuality]:
        protocol = self.task.length_protocol
        rows = tokenize_long(self.tokenizer, protocol.length, self.task.long_texts)
        return measure_length(self.model, self.systems, rows, protocol)

    def needle(self) -> list[NeedleScore]:
        texts = long_texts()[: self.task.needle_texts]
        stacks = haystacks(self.tokenizer, texts, self.task.needle_lengths)
        dense = measure_needle(self.model, self.tokenizer, dense_system(), stacks)
        scores = [summarize_needle(dense_system().name, dense, stacks)]
        for system in self._quantised():
            found = measure_needle(self.model, self.tokenizer, system, stacks)
            scores.append(summarize_needle(system.name, found, stacks, dense))
        return scores

    def mmlu(self) -> list[MmluScore]:
        count = min(self.task.questions, MMLU_SUBJECTS)
        each = -(-self.task.questions // count)
        subjects = load_subjects(self.tokenizer, each, count, self.task.skip_questions)
        dense, storage = measure_mmlu(self.model, self.tokenizer, dense_system(), subjects)
        scores = [summarize_mmlu(dense_system().name, dense, subjects, storage)]
        for system in self._quantised():
            logger.info("MMLU of %s", system.name)
            choices, storage = measure_mmlu(self.model, self.tokenizer, system, subjects)
            scores.append(summarize_mmlu(system.name, choices, subjects, storage, dense))
        return scores

    def speed(self) -> dict[str, list[SpeedRatio]]:
        task = self.task
        return measure_speed(
            self.model, self.systems, self.long_row(), task.contexts, task.groups, task.steps
        )

    def long_row(self) -> list[int]:
        task = self.task
        length = speed_tokens(task.contexts, task.groups, task.steps)
        return tokenize(self.tokenizer, long_texts()[:1], length)[0]

    def peer_task(self, folder: Path) -> PeerTask:
        task, parts = self.task, self.task.parts
        return PeerTask(
            model=folder,
            texts=self.quality_rows() if "quality" in parts else (),
            dense=self.dense,
            protocol=task.protocol,
            long=self.long_row() if "speed" in parts else (),
            contexts=task.contexts if "speed" in parts else (),
            groups=task.groups,
            steps=task.steps,
        )

    def _quantised(self) -> list[CacheSystem]:
        return [system for system in self.systems if system.name != dense_system().name]


def _peer_results(results: dict[str, Any], run: PeerRun) -> dict[str, Any]:
    """The parts that a peer was measured in, with its own figures last. Reports before keep theirs."""
    found = {}
    if run.quality is not None:
        own = summarize_quality(run.name, run.bits, run.quality, peer=True)
        found["quality"] = [*results["quality"], own]
    if run.speed is not None:
        found["speed"] = {**results["speed"], run.name: run.speed}
    return found
