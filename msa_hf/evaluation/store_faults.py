"""Lets the disk fail at every single call that a store makes, and checks that the store is whole every time.

For every operation: the first call that changes a file fails, then in a fresh copy of the store the second,
and so on until none is left. The process must have been started with `failing_disk.library` in LD_PRELOAD,
see `fail_preloaded`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from msa_hf.evaluation import failing_disk
from msa_hf.evaluation.failing_disk import KILL, FailingDisk
from msa_hf.evaluation.trial_stores import Author, Expected, Inspector, Operation, byte_tokenizer, tiny_model
from msa_hf.modeling.errors import MSAError
from msa_hf.store import MemoryStore

LONGEST = 60  # seconds that a trial may take; then it hangs


@dataclass(frozen=True)
class Fault:
    """How the disk fails: with which errno, once or from then on, and whether the process dies after it."""

    error: int
    always: bool = False
    dies: bool = False
    kinds: int = failing_disk.WRITING

    def __str__(self) -> str:
        name = "SIGKILL" if self.error == KILL else errno.errorcode[self.error]
        return name + ", from then on" * self.always + ", process dies" * self.dies


FAULTS = [
    Fault(error, always, dies)
    for error in (errno.ENOSPC, errno.EIO)
    for always in (False, True)
    for dies in (False, True)
] + [Fault(KILL)]
READING = Fault(errno.EIO, kinds=failing_disk.READING)
# Faults that are tried in turn, and at every how many calls.
_PWRITE = 1 << failing_disk.CALLS.index("pwrite")
ALL_SERIES = [([fault], 1) for fault in [*FAULTS, READING]]
SHORT_SERIES = [
    ([replace(fault, kinds=failing_disk.WRITING & ~_PWRITE) for fault in FAULTS], 1),
    ([replace(fault, kinds=_PWRITE) for fault in FAULTS], 13),
    ([READING], 13),
]


@dataclass
class FaultReport:
    """What happened: failing calls by operation and kind, and every problem."""

    faults: int = 0
    seconds: float = 0.0
    hit: dict[str, Counter] = field(default_factory=dict)
    outcomes: Counter = field(default_factory=Counter)  # error, or "done" where the fault did no harm
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One operation on a copy of the store in `base` (None: no store), and the states before and after it."""

    name: str
    base: Path | None
    before: Expected
    after: Expected
    work: Callable[[MemoryStore | None, Path], MemoryStore | None]


def fail_everywhere(folder: Path, all_faults: bool, seed: int = 0) -> FaultReport:
    """Every fault at every call of every operation.

    If not `all_faults`: one fault after another in turn, and of the many writes into files every 13th.
    """
    report, start = FaultReport(), time.perf_counter()
    inspector, disk = Inspector(tiny_model(), byte_tokenizer()), FailingDisk()
    for case in _cases(folder, inspector, disk, seed):
        report.hit[case.name] = Counter()
        for series, step in ALL_SERIES if all_faults else SHORT_SERIES:
            nth, failed = 1, True
            while failed:
                fault = series[nth // step % len(series)]
                failed = _trial(case, folder / "trial", inspector, disk, fault, nth, report)
                nth += step
    report.seconds = time.perf_counter() - start
    return report


def fail_preloaded(folder: Path, all_faults: bool, seed: int = 0) -> FaultReport:
    """`fail_everywhere` in a new process with the library in LD_PRELOAD. Raises MSAError if that fails."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "LD_PRELOAD": str(failing_disk.library(folder)),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", __name__, str(folder), str(int(all_faults)), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MSAError(f"the trial of faults ended with status {done.returncode}: {done.stderr[-2000:]}")
    return FaultReport(**json.loads(done.stdout.splitlines()[-1]))


def _cases(folder: Path, inspector: Inspector, disk: FailingDisk, seed: int) -> list[Case]:
    """All operations, on a store with some history."""
    author, before = Author(random.Random(seed)), Expected()
    base = folder / "base"
    with MemoryStore.create(base, inspector.model, inspector.tokenizer) as store:
        for operation in _history(author):
            operation.run(store)
            before = before.after(operation)
    empty = Expected()
    cases = [Case("create", None, empty, empty, _creating(inspector))]
    for operation in (
        Operation("add", author.additions(["x", "y"])),
        Operation("update", {"id": "a", "text": author.text(), "namespace": "default"}),
        Operation("delete", {"ids": ["a", "b"], "namespace": "default"}),
        Operation("undo", {"steps": 2}),
        Operation("redo", {"steps": 1}),
        Operation("compact", {"history": True}),
        Operation("compact", {"history": False}),
        Operation("forget", {"ids": ["a", "c"], "namespace": "default"}),
    ):
        name = operation.method + " without history" * (operation.arguments == {"history": False})
        cases.append(Case(name, base, before, before.after(operation), _running(operation)))
    unfinished = folder / "unfinished"
    shutil.copytree(base, unfinished)
    _kill_in_erasure(unfinished, inspector, disk, cases[-1])
    after = cases[-1].after
    cases.append(Case("open after a crash", unfinished, after, after, _opening(inspector)))
    cases.append(Case("open for reading", base, before, before, _reading))
    cases.append(Case("close", base, before, before, _closing))
    return cases


def _history(author: Author) -> list[Operation]:
    return [
        Operation("add", author.additions(["a", "b", "c"])),
        Operation("add", author.additions(["d"])),
        Operation("update", {"id": "a", "text": author.text(), "namespace": "default"}),
        Operation("delete", {"ids": ["b"], "namespace": "default"}),
        Operation("undo", {"steps": 1}),
    ]


def _creating(inspector: Inspector):
    return lambda store, place: MemoryStore.create(place, inspector.model, inspector.tokenizer)


def _opening(inspector: Inspector):
    return lambda store, place: MemoryStore.open(place, inspector.model, inspector.tokenizer)


def _reading(store: None, place: Path) -> MemoryStore:
    return MemoryStore.open(place, read_only=True)


def _running(operation: Operation):
    def work(store: MemoryStore, place: Path) -> MemoryStore:
        operation.run(store)
        return store

    return work


def _closing(store: MemoryStore, place: Path) -> None:
    store.close()


def _kill_in_erasure(place: Path, inspector: Inspector, disk: FailingDisk, forget: Case) -> None:
    """Leaves a store whose last erasure is committed and not finished."""
    child = os.fork()
    if child == 0:
        store = MemoryStore.open(place, inspector.model, inspector.tokenizer)
        disk.fail(place, 1, KILL, kinds=1 << failing_disk.CALLS.index("unlink"))
        forget.work(store, place)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise RuntimeError("an erasure ended without removing a file")


def _trial(
    case: Case,
    place: Path,
    inspector: Inspector,
    disk: FailingDisk,
    fault: Fault,
    nth: int,
    report: FaultReport,
) -> bool:
    """One operation in a child, whose nth call fails; whether there was an nth call."""
    shutil.rmtree(place, ignore_errors=True)
    if case.base is not None:
        shutil.copytree(case.base, place)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(LONGEST)
            os.close(reader)
            answer = _suffer(case, place, inspector, disk, fault, nth)
        except BaseException:
            answer = {"failed": "?", "outcome": "?", "problems": [traceback.format_exc()]}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    _, status = os.waitpid(child, 0)
    if not received:
        problems = [] if status == signal.SIGKILL else [f"the process ended or hung: wait status {status}"]
        received = json.dumps({"failed": "killed", "outcome": "killed", "problems": problems})
    answer = json.loads(received)
    if answer["failed"] is None and not answer["problems"]:
        return False
    problems = answer["problems"] or _inspect(case, place, inspector, answer["outcome"])
    report.faults += 1
    report.hit[case.name][answer["failed"]] += 1
    report.outcomes[answer["outcome"]] += 1
    where = f"{case.name}, call {nth} ({answer['failed']}), {fault}"
    report.problems += [f"{where}: {problem}" for problem in problems]
    return answer["failed"] is not None


def _suffer(case: Case, place: Path, inspector: Inspector, disk: FailingDisk, fault: Fault, nth: int) -> dict:
    """The child: works on a failing disk, then looks at what it holds and, on a sound disk, does it again."""
    store = None
    if case.base is not None and not case.name.startswith("open"):
        store = MemoryStore.open(place, inspector.model, inspector.tokenizer)
    problems, outcome = [], "done"
    disk.fail(place, nth, fault.error, always=fault.always, kinds=fault.kinds)
    try:
        result = case.work(store, place)
    except MSAError as error:
        outcome, result = type(error).__name__, store
    except Exception as error:
        outcome, result = type(error).__name__, store
        problems.append("".join(traceback.format_exception(error)))
    failed = disk.failed()
    disk.stop()
    if case.name == "close" or problems or fault.dies or failed is None:
        return {"failed": failed, "outcome": outcome, "problems": problems}
    if result is None and case.base is None and fault.always:
        return {"failed": failed, "outcome": outcome, "problems": []}  # its remains could not be removed
    if result is None:  # it could not be created or opened
        result = case.work(None, place)
    possible = [case.after] if outcome == "done" else [case.before, case.after]
    found = next((state for state in possible if inspector.is_state(result, state)), None)
    if found is None:
        problems.append("the object has a state that never was")
    else:
        problems += inspector.differences(result, found)
        if found is case.before and case.before is not case.after:
            case.work(result, place)
            if not inspector.is_state(result, case.after):
                problems.append("the second attempt leads to another state")
            outcome += ", then done"
    result.close()
    return {"failed": failed, "outcome": outcome, "problems": problems}


def _inspect(case: Case, place: Path, inspector: Inspector, outcome: str) -> list[str]:
    """What is wrong with the store that a child left behind."""
    try:
        possible = [case.after] if outcome.endswith("done") else [case.before, case.after]
        return inspector.inspect(place, possible, reader_first=True)[0]
    except (MSAError, FileNotFoundError) as error:
        if case.base is None and not outcome.endswith("done"):
            return []
        return [f"it cannot be opened: {error!r}"]
    except Exception as error:
        return ["".join(traceback.format_exception(error))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = fail_everywhere(Path(sys.argv[1]), bool(int(sys.argv[2])), int(sys.argv[3]))
    sys.stdout.write(json.dumps(vars(found)) + "\n")
