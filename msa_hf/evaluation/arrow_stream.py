"""Columns of an Arrow IPC stream, the file format of Hugging Face datasets, without pyarrow.

Reads what benchmark data needs and nothing more: text, integers, and lists of these, without nulls,
dictionaries or compression (Arrow columnar format 1.x, "IPC streaming format"; its messages are flatbuffers).
Anything else is a ValueError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_CONTINUES = 0xFFFFFFFF
_SCHEMA, _RECORD_BATCH = 1, 3
_INT, _TEXT, _LIST = 2, 5, 12


def read_columns(data: bytes) -> dict[str, list[Any]]:
    """Name of each column -> its values. Raises ValueError for anything that is not understood."""
    fields: list[_Field] = []
    columns: dict[str, list[Any]] = {}
    place = 0
    while place + 8 <= len(data):
        marker, size = struct.unpack_from("<Ii", data, place)
        if marker != _CONTINUES:
            raise ValueError(f"no Arrow stream: expected a message at byte {place}")
        if size == 0:
            break
        message = _Table.root(data, place + 8)
        body = place + 8 + size
        kind, header = message.number(1, "B"), message.table(2)
        if kind == _SCHEMA:
            fields = [_Field.read(table) for table in header.tables(1)]
            columns = {field.name: [] for field in fields}
        elif kind == _RECORD_BATCH:
            if header.place(3):
                raise ValueError("a compressed Arrow stream")
            batch = _Batch(data, body, header.structs(1), header.structs(2))
            for field in fields:
                columns[field.name] += batch.read(field)
        else:
            raise ValueError(f"an Arrow message of kind {kind}")
        place = body + message.number(3, "q")
    return columns


@dataclass(frozen=True)
class _Table:
    """A flatbuffer table: fields by number, absent ones are zero."""

    data: bytes
    start: int

    @classmethod
    def root(cls, data: bytes, start: int) -> _Table:
        return cls(data, start + struct.unpack_from("<I", data, start)[0])

    def place(self, number: int) -> int:
        """Where a field is kept, 0 if it is absent."""
        vtable = self.start - struct.unpack_from("<i", self.data, self.start)[0]
        size = struct.unpack_from("<H", self.data, vtable)[0]
        entry = 4 + 2 * number
        offset = struct.unpack_from("<H", self.data, vtable + entry)[0] if entry + 2 <= size else 0
        return self.start + offset if offset else 0

    def number(self, number: int, kind: str) -> int:
        place = self.place(number)
        return struct.unpack_from(f"<{kind}", self.data, place)[0] if place else 0

    def _follow(self, number: int) -> int:
        place = self.place(number)
        if not place:
            raise ValueError(f"an Arrow message lacks field {number}")
        return place + struct.unpack_from("<I", self.data, place)[0]

    def table(self, number: int) -> _Table:
        return _Table(self.data, self._follow(number))

    def text(self, number: int) -> str:
        start = self._follow(number)
        size = struct.unpack_from("<I", self.data, start)[0]
        return self.data[start + 4 : start + 4 + size].decode()

    def tables(self, number: int) -> list[_Table]:
        if not self.place(number):
            return []
        start = self._follow(number)
        places = [start + 4 + 4 * i for i in range(struct.unpack_from("<I", self.data, start)[0])]
        return [_Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) for place in places]

    def structs(self, number: int) -> list[tuple[int, int]]:
        """A vector of pairs of 64-bit integers: field nodes or buffers."""
        start = self._follow(number)
        count = struct.unpack_from("<I", self.data, start)[0]
        return [struct.unpack_from("<qq", self.data, start + 4 + 16 * i) for i in range(count)]


@dataclass(frozen=True)
class _Field:
    name: str
    kind: int
    bits: int
    children: tuple[_Field, ...]

    @classmethod
    def read(cls, table: _Table) -> _Field:
        kind = table.number(2, "B")
        if kind not in (_INT, _TEXT, _LIST) or table.place(4):
            raise ValueError(f"column {table.text(0)!r} is neither text, integers nor a list of them")
        bits = table.table(3).number(0, "i") if kind == _INT else 0
        return cls(table.text(0), kind, bits, tuple(cls.read(child) for child in table.tables(5)))


class _Batch:
    """One record batch; its field nodes and buffers are used up in the order of the schema."""

    def __init__(self, data: bytes, body: int, nodes: list[tuple], buffers: list[tuple]):
        self.data, self.body = data, body
        self.nodes, self.buffers = iter(nodes), iter(buffers)

    def read(self, field: _Field) -> list[Any]:
        length, nulls = next(self.nodes)
        if nulls:
            raise ValueError(f"column {field.name!r} holds nulls")
        next(self.buffers)  # validity
        if field.kind == _INT:
            kind = {8: "b", 16: "h", 32: "i", 64: "q"}[field.bits]
            return list(struct.unpack_from(f"<{length}{kind}", self.data, self._start()))
        ends = struct.unpack_from(f"<{length + 1}i", self.data, self._start()) if length else (0,)
        if field.kind == _TEXT:
            start = self._start()
            return [self.data[start + a : start + b].decode() for a, b in zip(ends, ends[1:])]
        values = self.read(field.children[0])
        return [values[a:b] for a, b in zip(ends, ends[1:])]

    def _start(self) -> int:
        return self.body + next(self.buffers)[0]
