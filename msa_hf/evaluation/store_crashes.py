"""Kills a process that writes to a store, again and again, and checks that the store is whole every time.

A forked child carries out random operations and acknowledges each over a pipe. It dies by SIGKILL: at a
random time, or before or after a random call into SQLite, safetensors or the file system, so that the short
moments between two writes are hit, too. The store must then be that of all acknowledged operations, or of one
more.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from msa_hf.evaluation.trial_stores import Author, Expected, Inspector, Operation, byte_tokenizer, tiny_model
from msa_hf.store import MemoryStore

OPERATIONS = 8  # planned for every child; most die before the last
KILLS_PER_STORE = 6
LONGEST = 60  # seconds that a child may take; then it hangs
# Calls of which the child counts the beginning and the end.
MOMENTS = frozenset(
    "execute executemany fsync unlink replace rename open flock truncate write flush close serialize_file "
    "mkdir scandir".split()
)


@dataclass
class CrashReport:
    """What happened: kills by where they hit, and every problem with the seed of its store."""

    kills: int = 0
    seconds: float = 0.0
    hit: Counter = field(default_factory=Counter)
    unacknowledged: int = 0  # operations that had become durable, but were not yet acknowledged
    problems: list[str] = field(default_factory=list)


def kill_often(times: int, folder: Path, seed: int = 0) -> CrashReport:
    """Kills writers of stores in `folder`, `times` times."""
    report, start = CrashReport(), time.perf_counter()
    inspector = Inspector(tiny_model(), byte_tokenizer())
    number = 0
    while report.kills < times:
        place = folder / f"store-{number}"
        try:
            _one_store(place, inspector, seed + number, min(KILLS_PER_STORE, times - report.kills), report)
        except Exception:
            report.problems.append(f"seed {seed + number}: {traceback.format_exc()}")
        shutil.rmtree(place, ignore_errors=True)
        number += 1
    report.seconds = time.perf_counter() - start
    return report


def _one_store(place: Path, inspector: Inspector, seed: int, kills: int, report: CrashReport) -> None:
    """Several kills, one after another, of writers of one store."""
    numbers = random.Random(seed)
    author, expected = Author(numbers), Expected()
    MemoryStore.create(place, inspector.model, inspector.tokenizer).close()
    for kill in range(kills):
        operations = author.operations(expected, OPERATIONS)
        report.kills += 1
        done = _run_killed(place, inspector, operations, numbers)
        states = [expected]
        for operation in operations:
            states.append(states[-1].after(operation))
        possible = states[done : done + 2]
        where = operations[done].method if done < OPERATIONS else "end"
        report.hit[where] += 1
        problems, expected = inspector.inspect(place, possible, reader_first=numbers.random() < 0.5)
        report.unacknowledged += expected is not possible[0]
        report.problems += [f"seed {seed}, kill {kill} in {where}: {problem}" for problem in problems]
        if problems:
            return


def _run_killed(
    place: Path, inspector: Inspector, operations: list[Operation], numbers: random.Random
) -> int:
    """Runs a writer that is killed; how many operations it acknowledged."""
    moment = (numbers.randint(-1, OPERATIONS - 2), numbers.randint(1, 80)) if numbers.random() < 0.8 else None
    delay = numbers.uniform(0.0, 0.25)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _work(place, inspector, operations, writer, moment)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    if moment is None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        done = len(pipe.read())
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the writer failed or hung after {done} operations (wait status {status})")
    return done


def _work(
    place: Path,
    inspector: Inspector,
    operations: list[Operation],
    pipe: int,
    moment: tuple[int, int] | None,
) -> None:
    """The child: opens the store, which is number -1, and carries out the operations."""
    signal.alarm(LONGEST)
    tqdm.set_lock(threading.RLock())  # its own lock is shared between processes, and a killed one may hold it
    if moment is not None and moment[0] == -1:
        _die_at(moment[1])
    store = MemoryStore.open(place, inspector.model, inspector.tokenizer)
    for number, operation in enumerate(operations):
        if moment is not None and moment[0] == number:
            _die_at(moment[1])
        operation.run(store)
        os.write(pipe, b".")


def _die_at(count: int) -> None:
    """From now on this process counts the moments of `MOMENTS`, and kills itself at one of them."""
    left = count

    def notice(frame, event, called):
        nonlocal left
        if event in ("c_call", "c_return", "c_exception") and called.__name__ in MOMENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(notice)
