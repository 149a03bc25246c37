"""Databases that somebody made on purpose: other tables, triggers, views, values of wrong types, odd names.

Each is a small store whose database was changed by SQL. Whoever opens it must get a typed error or an answer,
as in `store_damage`; what could run SQL of a stranger must not be opened at all.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load, save

from msa_hf.evaluation.store_damage import Damaged, DamageReport, small_stores, try_stores
from msa_hf.evaluation.trial_stores import byte_tokenizer, tiny_model
from msa_hf.store import MemoryStore, StoreError
from msa_hf.store.database import FILE

Change = Callable[[sqlite3.Connection], None]

VALUES = (
    None,
    "text",
    "",
    b"",
    b"\xff\xfe",
    -1,
    0,
    1,
    2**31,
    2**62,
    -(2**63),
    1e300,
    -0.5,
    "9" * 400,
    "[" * 9000,
)
TABLES = {
    "commits": ("id", "time", "kind", "added", "removed", "parent", "state", "tip"),
    "versions": ("id", "namespace", "document", "sha256", "tokens", "segment", "position"),
    "contents": ("version", "metadata", "text"),
    "lives": ("version", "born", "died"),
    "segments": ("id", "name", "bytes", "sha256", "documents", "tier"),
    "uses": ("namespace", "document", "count", "last"),
    "tombstones": ("digest", "time"),
    "names": ("name", "words", "version"),
    "texts_docsize": ("id", "sz"),
    "texts_data": ("id", "block"),
    "texts_idx": ("segid", "term", "pgno"),
    "texts_config": ("k", "v"),
    "sqlite_sequence": ("name", "seq"),
}
JSON = (
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "1" * 400,
    '"text"',
    "[]",
    "{}",
    "[[]]",
    "[" * 9000,
    '{"a": 1',
    "\x00",
    "NaN",
)
NAMES = (
    "../store.sqlite",
    "/etc/passwd",
    "",
    ".",
    "..",
    "a/b",
    "x" * 5000,
    "a\x00b",
    "segments",
    "*",
    "nul\n",
)
# With these a store must not even be opened: SQL that would run by itself, tables that are something else.
SCHEMAS = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON commits BEGIN DELETE FROM versions; END",
    "a trigger with a table's name": "CREATE TRIGGER lives AFTER INSERT ON commits BEGIN SELECT 1; END",
    "a view": "CREATE VIEW v AS SELECT * FROM versions",
    "a table": "CREATE TABLE other (x)",
    "an index": "CREATE INDEX i ON versions (abs(tokens))",
    "a virtual table": "CREATE VIRTUAL TABLE other USING fts5(x)",
    "a view for a table": "ALTER TABLE uses RENAME TO own; CREATE VIEW uses AS SELECT * FROM own",
    "another column": "ALTER TABLE versions ADD COLUMN x",
    "a table less": "DROP TABLE tombstones",
    "an endless view for a table": "DROP TABLE uses; CREATE VIEW uses AS WITH RECURSIVE r(namespace, "
    "document, count, last) AS (SELECT 'a', 'b', 1, 1 UNION ALL SELECT * FROM r) SELECT * FROM r",
    "a trigger named like statistics": "CREATE TRIGGER t AFTER INSERT ON commits BEGIN SELECT 1; END; "
    "PRAGMA writable_schema=ON; UPDATE sqlite_master SET name='sqlite_stat9', "
    "sql=replace(sql, ' t ', ' sqlite_stat9 ') WHERE name='t'",
    "a trigger before the table of its name": "CREATE TRIGGER lives AFTER INSERT ON commits "
    "BEGIN SELECT 1; END; PRAGMA writable_schema=ON; UPDATE sqlite_master SET rowid=rowid+10000 "
    "WHERE tbl_name='lives' AND type<>'trigger'",
    "another program": "PRAGMA application_id=7",
    "a later format": "UPDATE store SET value='2' WHERE name='format_version'",
}
STATEMENTS = {
    "a commit that is its own parent": "UPDATE commits SET parent=id",
    "parents in a circle": "UPDATE commits SET parent=(SELECT max(id) FROM commits)",
    "a state that is not there": "UPDATE commits SET state=999, tip=999",
    "a tip before its state": "UPDATE commits SET tip=1",
    "no commits": "DELETE FROM commits",
    "lives that end first": "UPDATE lives SET died=born",
    "lives that begin in the future": "UPDATE lives SET born=born+1000000",
    "lives of everything": "UPDATE lives SET died=NULL",
    "two lives at once": "INSERT OR IGNORE INTO lives SELECT version, born+1, NULL FROM lives",
    "no lives": "DELETE FROM lives",
    "the same document in all versions": "UPDATE versions SET namespace='default', document='a'",
    "no versions": "DELETE FROM versions",
    "no contents": "DELETE FROM contents",
    "no segments": "DELETE FROM segments",
    "no words": "DELETE FROM texts_docsize",
    "no values": "DELETE FROM store",
    "no sequence": "DELETE FROM sqlite_sequence",
    "a sequence at its end": f"UPDATE sqlite_sequence SET seq={2**63 - 1}",
    "positions changed": "UPDATE versions SET position=1-position",
    "tokens beyond memory": f"UPDATE versions SET tokens={2**31 - 1}",
    "documents beyond memory": f"UPDATE segments SET documents={2**40}",
    "words of no version": "UPDATE names SET version=version+1000, words=1000000000",
    "words of a long name": "UPDATE names SET words=1000000000",
    "texts of 10 MB": "UPDATE contents SET text=hex(zeroblob(5000000))",
    "metadata of 1 MB": "UPDATE contents SET metadata='{\"n\": \"' || hex(zeroblob(500000)) || '\"}'",
    "metadata nested deeply": "UPDATE contents SET metadata=replace(hex(zeroblob(20000)), '00', '[')",
    "statistics that lie": "ANALYZE; UPDATE sqlite_stat1 SET stat='99999999999 1 1 1'",
    "a journal on disk": "PRAGMA journal_mode=DELETE",
    "pages of 512 bytes": "PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM",
}


def try_hostile(folder: Path, every: int = 1) -> DamageReport:
    """Every hostile database, or one of so many; read, and written."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    base = small_stores(folder, model, tokenizer)[0]
    cases = list(hostile_changes(base))

    def make(number: int, place: Path) -> Damaged:
        kind, change = cases[number // 2]  # the even numbers are written to, the odd ones only read
        shutil.copytree(base, place)
        apply(place, change)
        if kind in SCHEMAS and _opens(place):
            raise AssertionError(f"{kind}: the store was opened")
        return Damaged(kind)

    return try_stores(range(0, 2 * len(cases), every), make, folder, model, tokenizer)


def apply(place: Path, change: Change) -> None:
    """Changes the database of the store in `place`; what SQLite itself forbids is left undone."""
    with closing(sqlite3.connect(place / FILE, isolation_level=None)) as connection:
        try:
            change(connection)
        except (sqlite3.IntegrityError, sqlite3.OperationalError):
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def hostile_changes(base: Path) -> Iterator[tuple[str, Change]]:
    """All of them, with what each does."""
    for kind, statement in {**SCHEMAS, **STATEMENTS}.items():
        yield kind, lambda connection, own=statement: connection.executescript(own)
    for table, columns in TABLES.items():
        for column in columns:
            for value in VALUES:
                yield f"{table}.{column} = {str(value)[:20]!r}", _setting(table, column, value)
    for name in NAMES:
        yield f"a segment named {name[:20]!r}", _setting("segments", "name", name)
    with closing(sqlite3.connect(base / FILE)) as connection:
        stored = dict(connection.execute("SELECT name, value FROM store"))
    for name in stored:
        for value in (*JSON, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", 7, 2**62, 0.5):
            yield f"store.{name} = {str(value)[:20]!r}", _keeping(name, value)
    for path, value in _provenances(json.loads(stored["provenance"])):
        yield path, _keeping("provenance", json.dumps(value))
    for kind, value in _codings(stored["coding"]):
        yield kind, _keeping("coding", value)


def _setting(table: str, column: str, value: object) -> Change:
    """Sets one column of all rows, or of one where they must differ, even to what the table forbids."""

    def change(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        sql = connection.execute("SELECT sql FROM sqlite_master WHERE name=?", (table,)).fetchone()[0]
        loose = "UPDATE sqlite_master SET sql=? WHERE name=?"
        connection.execute(loose, (sql.replace(" NOT NULL", ""), table))
        with closing(sqlite3.connect(_file(connection), isolation_level=None)) as other:
            try:
                other.execute(f"UPDATE {table} SET {column}=?", (value,))
            except sqlite3.IntegrityError:
                first = f"(SELECT {column} FROM {table} ORDER BY {column} DESC LIMIT 1)"
                try:
                    other.execute(f"UPDATE {table} SET {column}=? WHERE {column}={first}", (value,))
                except sqlite3.IntegrityError:
                    pass
        connection.execute(loose, (sql, table))

    return change


def _keeping(name: str, value: object) -> Change:
    return lambda connection: connection.execute("UPDATE store SET value=? WHERE name=?", (value, name))


def _file(connection: sqlite3.Connection) -> str:
    return connection.execute("PRAGMA database_list").fetchone()[2]


def _provenances(stored: dict) -> Iterator[tuple[str, dict]]:
    """The provenance with one thing in it changed."""
    values = (
        None,
        -1,
        0,
        1,
        2**31 - 1,
        2**62,
        0.5,
        "text",
        [],
        [0],
        [10**9],
        [-1],
        [[]],
        {},
        {"a": []},
        True,
    )
    for field in [*stored, "other"]:
        for value in values:
            yield f"provenance {field} = {value!r}", {**stored, field: value}
    for field in [*stored["settings"], "other"]:
        for value in values:
            settings = {**stored["settings"], field: value}
            yield f"settings {field} = {value!r}", {**stored, "settings": settings}


def _codings(stored: bytes) -> Iterator[tuple[str, bytes]]:
    """The coders with one tensor changed."""
    tensors = load(stored)
    for name, tensor in tensors.items():
        for kind, changed in {
            "missing": None,
            "empty": tensor[:0],
            "longer": torch.cat([tensor, tensor]),
            "flat": tensor.reshape(-1),
            "whole numbers": tensor.to(torch.int64),
            "no number": tensor * float("nan"),
        }.items():
            others = {own: value for own, value in tensors.items() if own != name}
            yield f"{name} {kind}", save(others | ({} if changed is None else {name: changed.contiguous()}))
    for name in ("head.x.keys", "head", "head.99999999999999999999.keys", "means.1.router_keys"):
        yield f"a tensor {name}", save({**tensors, name: torch.zeros(1)})


def _opens(place: Path) -> bool:
    try:
        MemoryStore.open(place).close()
        return True
    except (StoreError, ValueError):
        return False
