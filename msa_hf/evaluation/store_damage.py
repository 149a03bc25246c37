"""Damages the files of small stores at random; whoever opens them must get a typed error or an answer.

Every damaged store is read, and half of them are written to, in a forked child with a limit of time and
memory: no crash, no hang, no exception that is not an `MSAError`. `verify` must find every change of a
segment.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msa_hf.evaluation.trial_stores import Author, byte_tokenizer, tiny_model
from msa_hf.modeling.errors import MSAError
from msa_hf.modeling.memory_files import NAMES
from msa_hf.store import MemoryStore
from msa_hf.store.database import FILE, LOCK, READERS, SEGMENTS

PER_CHILD = 200
LONGEST = 30.0  # seconds for one store; then it hangs
MEMORY = 4 << 30  # bytes that a child may take beyond what it starts with
PAGE = 4096
KINDS = ["flip"] * 6 + ["cut", "zero", "page", "swap", "duplicate", "remove", "grow", "replace", "odd"]


@dataclass
class DamageReport:
    """What happened: how the stores answered, and every problem by kind with one example of each."""

    stores: int = 0
    seconds: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    found: Counter = field(default_factory=Counter)  # problem: how often
    problems: list[str] = field(default_factory=list)  # one example of each


@dataclass(frozen=True)
class Damaged:
    """A damaged store: what was done to it, and whether `verify` must find it."""

    kind: str
    must_be_found: bool = False


def damage_often(stores: int, folder: Path, seed: int = 0, seconds: float | None = None) -> DamageReport:
    """Damages `stores` copies of small stores in `folder`; no more after so many seconds."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    bases = small_stores(folder, model, tokenizer)

    def make(number: int, place: Path) -> Damaged:
        numbers = random.Random(f"{seed}/{number}")
        shutil.copytree(numbers.choice(bases), place)
        return Damage(place, numbers).apply()

    return try_stores(range(stores), make, folder, model, tokenizer, seconds)


def small_stores(folder: Path, model, tokenizer) -> list[Path]:
    """Two stores with some history, one of them with its last commits in the write-ahead log."""
    author, closed, logged = Author(random.Random(0)), folder / "closed", folder / "logged"
    with MemoryStore.create(closed, model, tokenizer) as store:
        store.add([f"{name} Stone\nIs {author.text()}" for name in "ABCD"], list("abcd"))
        store.update("a", "A Stone\nMentions D Stone.", metadata={"title": "t", "n": 1})
        store.add([author.text()], ["e"], "work")
        store.record_use(["a", "b"])
        store.delete(["b"])
        store.undo()
        store.forget(["c"])
    shutil.copytree(closed, logged)
    with MemoryStore.open(logged, model, tokenizer) as store:
        store.add([author.text()], ["f"])
        store.delete("d")
        shutil.copytree(logged, folder / "copy", ignore=shutil.ignore_patterns("*-shm"))
    shutil.rmtree(logged)
    (folder / "copy").rename(logged)
    return [closed, logged]


class Damage:
    """Random damage to the files of a store in `place`."""

    def __init__(self, place: Path, numbers: random.Random):
        self.place, self.random = place, numbers
        self.segments = sorted((place / SEGMENTS).glob("*"))
        self.database = [path for path in (place / FILE, place / f"{FILE}-wal") if path.exists()]

    def apply(self) -> Damaged:
        """Does one thing to one or two files."""
        kind = self.random.choice(KINDS)
        path = self.random.choice(self.segments + self.database * 3)
        before = {own: own.read_bytes() for own in self.segments}
        getattr(self, f"_{kind}")(path)
        changed = any(not own.is_file() or own.read_bytes() != content for own, content in before.items())
        return Damaged(f"{kind} {path.suffix}", changed)

    def _flip(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        place = self.random.randrange(len(content))
        for _ in range(self.random.choice([1, 1, 1, 2, 8])):
            content[place] ^= self.random.choice([1 << self.random.randrange(8), self.random.randint(1, 255)])
            near = self.random.random() < 0.5
            place = min(place + 1, len(content) - 1) if near else self.random.randrange(len(content))
        path.write_bytes(content)

    def _cut(self, path: Path) -> None:
        os.truncate(path, self.random.choice([0, 1, 16, self.random.randrange(path.stat().st_size)]))

    def _zero(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        start = self.random.randrange(len(content))
        stop = min(len(content), start + self.random.choice([1, 8, 100, 512, PAGE]))
        content[start:stop] = self.random.choice([bytes(stop - start), b"\xff" * (stop - start)])
        path.write_bytes(content)

    def _page(self, path: Path) -> None:
        """One page, or a part of one, in the place of another."""
        content = bytearray(path.read_bytes())
        size = min(self.random.choice([8, 512, PAGE]), len(content))
        source, target = (self.random.randrange(0, len(content) - size + 1, 8) for _ in range(2))
        if size == PAGE:
            source, target = source // PAGE * PAGE, target // PAGE * PAGE
        content[target : target + size] = content[source : source + size]
        path.write_bytes(content)

    def _swap(self, path: Path) -> None:
        other = self.random.choice(self.segments + self.database)
        mine, its = path.read_bytes(), other.read_bytes()
        path.write_bytes(its)
        other.write_bytes(mine)

    def _duplicate(self, path: Path) -> None:
        names = [f"{FILE}-journal", f"{FILE}-wal", f"{FILE}-shm", LOCK, f"{SEGMENTS}/copy.safetensors"]
        content = path.read_bytes()
        (self.place / self.random.choice(names)).write_bytes(content)

    def _remove(self, path: Path) -> None:
        path.unlink()

    def _grow(self, path: Path) -> None:
        with open(path, "ab") as file:
            file.write(self.random.randbytes(self.random.choice([1, 100, PAGE])))

    def _replace(self, path: Path) -> None:
        """By something that is no such file."""
        path.unlink()
        target = self.random.choice([None, path.name, "/dev/null"])
        path.mkdir() if target is None else path.symlink_to(target)

    def _odd(self, path: Path) -> None:
        """Things that a store does not make, or without which it was not left."""
        readers, number = self.place / READERS, self.random.choice(["", "9" * 30, "x", "-1", "²", "1"])
        readers.mkdir(exist_ok=True)
        mark = readers / f"{number}-{self.random.getrandbits(32):x}"
        self.random.choice([mark.mkdir, mark.touch, lambda: mark.symlink_to(mark.name)])()
        (self.place / LOCK).write_bytes(self.random.randbytes(20))
        if self.random.random() < 0.5:
            shutil.rmtree(self.place / self.random.choice([READERS, SEGMENTS]))


def try_stores(
    wanted: Sequence[int],
    make: Callable[[int, Path], Damaged],
    folder: Path,
    model,
    tokenizer,
    seconds: float | None = None,
) -> DamageReport:
    """Makes the damaged stores of these numbers one after another, and uses each of them."""
    report, start, todo = DamageReport(), time.perf_counter(), list(wanted)
    while todo and (seconds is None or time.perf_counter() - start < seconds):
        portion, todo = todo[:PER_CHILD], todo[PER_CHILD:]
        done = 0
        for number, answer in _use_in_child(portion, make, folder / "trial", model, tokenizer):
            done += 1
            report.stores += 1
            report.kinds[answer["kind"]] += 1
            report.answers[answer["answer"]] += 1
            for problem, example in answer["problems"]:
                report.found[problem] += 1
                if report.found[problem] == 1:
                    report.problems.append(f"number {number} ({answer['kind']}): {problem}\n{example}")
        todo = portion[done:] + todo
    report.seconds = time.perf_counter() - start
    return report


def _use_in_child(
    portion: list[int], make: Callable[[int, Path], Damaged], place: Path, model, tokenizer
) -> Iterator[tuple[int, dict]]:
    """Answers about damaged stores; after a crash or hang of the child, those until then."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            try:
                _use_all(portion, make, place, model, tokenizer, pipe)
            except BaseException:
                traceback.print_exc()
        os._exit(0)
    os.close(writer)
    waiting, done = b"", 0
    while True:
        ready, _, _ = select.select([reader], [], [], LONGEST)
        if not ready:
            os.kill(child, signal.SIGKILL)
        received = os.read(reader, 1 << 16) if ready else b""
        if not received:
            break
        *lines, waiting = (waiting + received).split(b"\n")
        for line in lines:
            yield portion[done], json.loads(line)
            done += 1
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if done < len(portion):
        what = "hangs" if status == signal.SIGKILL else f"crashes (wait status {status})"
        yield portion[done], {"kind": "?", "answer": what, "problems": [(what, "")]}


def _use_all(portion: list[int], make, place: Path, model, tokenizer, pipe) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in portion:
        shutil.rmtree(place, ignore_errors=True)
        damaged = make(number, place)
        answer, problems = use(place, damaged.must_be_found, number % 2 == 0, model, tokenizer)
        pipe.write(json.dumps({"kind": damaged.kind, "answer": answer, "problems": problems}) + "\n")
        pipe.flush()


def use(
    place: Path, must_be_found: bool, writes: bool, model, tokenizer
) -> tuple[str, list[tuple[str, str]]]:
    """Does everything with a store that may be damaged: how it answered, and (problem, details)."""
    trial = _Trial()
    for read_only in (True, False):
        store = trial.call(MemoryStore.open, place, read_only=read_only, missing=not (place / FILE).is_file())
        if store is not None:
            _read(store, trial)
            found = trial.call(store.verify)
            # A writer removes files of which a damaged write-ahead log has lost the commit.
            if found == [] and must_be_found and read_only and not trial.errors:
                trial.problems.append(("verify finds nothing", ""))
            trial.noticed |= bool(found)
            trial.call(store.close)
    if writes:
        store = trial.call(MemoryStore.open, place, model, tokenizer, missing=not (place / FILE).is_file())
        if store is not None:
            _write(store, trial)
            trial.call(store.close)
    first = next(iter(trial.errors), "verify finds it" if trial.noticed else "nothing is noticed")
    return first, trial.problems


class _Trial:
    """Calls methods, and tells errors that were raised on purpose from others."""

    def __init__(self):
        self.errors: list[str] = []
        self.problems: list[tuple[str, str]] = []
        self.noticed = False

    def call(self, method: Callable, *arguments, missing: bool = False, **named):
        try:
            return method(*arguments, **named)
        except Exception as error:
            if not isinstance(error, MSAError) and not (missing and isinstance(error, FileNotFoundError)):
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{method.__name__}: {type(error).__name__} in {Path(last.filename).name}:{last.name}"
                self.problems.append((kind, "".join(traceback.format_exception(error))[-3000:]))
            self.errors.append(type(error).__name__)


def _read(store: MemoryStore, trial: _Trial) -> None:
    trial.call(store.refresh)
    for method in (store.list, store.count, store.search):
        query = ("stone river D Stone",) if method == store.search else ()
        trial.call(method, *query, namespaces="*")
    trial.call(store.list, where={"n": 1})
    trial.call(store.namespaces)
    trial.call(store.log)
    trial.call(store.stats)
    trial.call(store.was_forgotten, "c")
    trial.call(lambda: store.model_path)
    for id in "abd":
        trial.call(store.get, id)
        trial.call(store.history, id)
    earlier = trial.call(store.snapshot, 3)
    if earlier is not None:
        trial.call(earlier.list, namespaces="*")
    bank = trial.call(store.bank, "*")
    if bank is not None:
        trial.call(_read_bank, bank)


def _read_bank(bank) -> None:
    """Every vector, text and note."""
    for layer in bank.layers.values():
        for name in NAMES:
            storage = getattr(layer, name)
            storage.slice(0, len(storage))
    list(bank.documents)
    list(bank.metadata["documents"])
    bank.stats()


def _write(store: MemoryStore, trial: _Trial) -> None:
    trial.call(store.add, ["new text"], ["new"])
    trial.call(store.update, "a", "other text")
    trial.call(store.delete, "a")
    trial.call(store.undo)
    trial.call(store.redo)
    trial.call(store.record_use, ["d"])
    trial.call(store.set_budget, 2000)
    trial.call(store.forget, "d")
    trial.call(store.compact)
    trial.call(store.compact, history=False)
    trial.call(store.verify)
