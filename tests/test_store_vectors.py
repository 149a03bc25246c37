"""SegmentedRows against one storage that holds the same rows."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msa_hf.modeling.memory_bank import DenseVectors
from msa_hf.modeling.packed_vectors import PackedRows, RowCoder, RowPacking
from msa_hf.store import vectors
from msa_hf.store.residency import release
from msa_hf.store.vectors import SegmentedRows

HEADS, DIM = 2, 12
VECTORS = torch.randn(60, HEADS * DIM, generator=torch.Generator().manual_seed(0))
CODERS = {bits: RowCoder.fit(VECTORS, HEADS, RowPacking(bits)) for bits in (1, 3, 4)}


@cache
def storage(kind: int | None, start: int, stop: int):
    """Rows start to stop, dense or in `kind` bits."""
    rows = VECTORS[start:stop]
    return DenseVectors(rows) if kind is None else PackedRows.code(rows, CODERS[kind])


@st.composite
def runs(draw):
    """(segment, first row, rows) of documents in any order, some without rows."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        segment = draw(st.integers(0, 2))
        start = draw(st.integers(0, 20))
        found.append((segment, start, draw(st.integers(0, 20 - start))))
    return found


@pytest.mark.parametrize("kind", [None, 1, 3, 4])
@given(documents=runs(), data=st.data())
def test_rows_are_those_of_one_storage(kind, documents, data):
    segments = [storage(kind, 20 * number, 20 * number + 20) for number in range(3)]
    rows = [20 * segment + start + i for segment, start, count in documents for i in range(count)]
    if kind is None:
        whole = DenseVectors(VECTORS[rows])
    else:
        coded = storage(kind, 0, 60).packed[rows]
        whole = PackedRows(CODERS[kind], coded.codes, coded.scales, torch.float32)
    columns = [torch.tensor([own[i] for own in documents], dtype=torch.int64) for i in range(3)]
    view = SegmentedRows(segments, *columns, segments[0])
    assert (len(view), view.width, view.dtype, view.nbytes) == (
        len(rows),
        whole.width,
        whole.dtype,
        len(rows) * whole.row_bytes,
    )
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert torch.equal(view.slice(start, stop), whole.slice(start, stop))
    assert torch.equal(view.rotated_slice(start, stop), whole.rotated_slice(start, stop))
    if rows:
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9)))
        assert torch.equal(view.take(chosen), whole.take(chosen))
    joined = view.joined()
    assert torch.equal(joined.slice(0, len(joined)), whole.slice(0, len(rows)))


def test_rows_of_different_bits_and_dropped_ones():
    segments = [storage(4, 0, 20), storage(1, 20, 40), None]
    asked = []

    def restore(rows):
        asked.append(rows.tolist())
        return VECTORS[rows]

    sources, starts, counts = torch.tensor([1, 2, 0]), torch.tensor([5, 0, 2]), torch.tensor([3, 4, 2])
    view = SegmentedRows(segments, sources, starts, counts, segments[0], restore)
    taken = view.take(torch.tensor([8, 4, 0, 3, 7]))
    assert torch.equal(taken[[0, 4]], segments[0].take(torch.tensor([3, 2])))
    assert torch.equal(taken[2], segments[1].slice(5, 6)[0])
    assert torch.equal(taken[1], VECTORS[4]) and torch.equal(taken[3], VECTORS[3])
    assert asked == [[4, 3]]
    assert not view.is_uniform and view.to("meta") is view
    with pytest.raises(ValueError, match="different numbers of bits"):
        view.joined()


def test_segments_that_were_read_are_let_go_and_read_again(tmp_path, monkeypatch):
    save_file({"rows": torch.arange(2 * 3 * 4096 * 8.0).view(-1, 8)}, tmp_path / "rows.safetensors")
    rows = load_file(tmp_path / "rows.safetensors")["rows"]
    halves = [DenseVectors(rows[:12288]), DenseVectors(rows[12288:])]
    released = []
    monkeypatch.setattr(vectors, "RESIDENT_BYTES", 1000)
    monkeypatch.setattr(vectors, "release", lambda tensor: released.append(len(tensor)) or release(tensor))
    places = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([12288, 12288])
    view = SegmentedRows(halves, *places, halves[0])
    expected = torch.arange(2 * 3 * 4096 * 8.0).view(-1, 8)
    for _ in range(2):
        for start in range(0, len(view), 4096):
            assert torch.equal(view.rotated_slice(start, start + 4096), expected[start : start + 4096])
    assert released == [12288] * 3


def test_another_device_gets_one_storage():
    coder = RowCoder(RowPacking(4, centered=False), HEADS, DIM)
    segments = [PackedRows.code(VECTORS[rows], coder) for rows in (slice(0, 20), slice(20, 40))]
    places = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([20, 20])
    view = SegmentedRows(segments, *places, segments[0])
    assert view.to("cpu") is view
    moved = view.to("meta")
    assert isinstance(moved, PackedRows) and moved.device.type == "meta" and len(moved) == 40
