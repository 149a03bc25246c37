"""Weights out of safetensors files and into new ones, in portions: not even a tensor is in memory as a whole.

The files that are written have the bytes that safetensors itself would give them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from .modeling.errors import ConversionError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"  # as Transformers' save_pretrained
PORTION = 2**20  # numbers of a tensor that are read at once, where its rows are shorter
# In the order in which safetensors puts them into a file.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        file: where it lies. name: in that file. shape, dtype: what it is.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """All of it, as memory of its own."""
        return torch.cat([part.reshape(-1) for part in self.portions()]).reshape(self.shape)

    def portions(self) -> Iterator[torch.Tensor]:
        """Its rows in order, about `PORTION` numbers at once.

        The file is opened anew each time: its pages count as memory of the process while it is mapped.
        """
        if not self.shape:
            with _opened(self.file) as file:
                yield file.get_tensor(self.name)
            return
        step = max(1, PORTION // max(1, torch.Size(self.shape[1:]).numel()))
        for start in range(0, max(1, self.shape[0]), step):
            with _opened(self.file) as file:
                part = file.get_slice(self.name)[start : start + step]
            yield part


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name; of two with one name the later counts.

    Raises:
        ConversionError: a file is damaged, or holds numbers that are not plain floating point.
    """
    found = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():
                own = file.get_slice(name)
                if own.get_dtype() not in DTYPES:
                    raise ConversionError(
                        f"{path}: {name} must be one of {', '.join(DTYPES)}; got {own.get_dtype()}. "
                        "Convert the weights before they were quantised"
                    )
                found[name] = StoredTensor(path, name, tuple(own.get_shape()), DTYPES[own.get_dtype()])
    return found


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read: {error}. Fetch or save it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, found as Transformers finds them.

    Raises:
        ConversionError: there are none, some are missing, or they are pickles.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        unsafe = (
            " (weights in .bin files are pickles: convert them first)" if any(folder.glob("*.bin")) else ""
        )
        raise ConversionError(f"{folder} has no {WEIGHTS}{unsafe}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / shard for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} must hold weight_map, a file for every weight; {error!r}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise ConversionError(f"{folder} lacks {', '.join(absent)}: the download is incomplete")
    return files


@contextmanager
def finished_folder(destination: Path) -> Iterator[Path]:
    """A folder to write in, which then becomes `destination`: a folder of this name is always complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as temporary:
        folder = Path(temporary) / destination.name
        folder.mkdir()
        yield folder
        os.replace(folder, destination)


def free_destination(destination: str | os.PathLike) -> Path:
    """An absolute path that nothing is overwritten at. Raises ConversionError if it is taken."""
    path = Path(destination).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} exists and is not an empty folder: choose another destination")
    return path


class WeightFiles:
    """Safetensors files of tensors that are known beforehand, filled in any order.

    The split and the index are those of save_pretrained of a model that from_pretrained has loaded.

    Args:
        folder: where the files are made.
        tensors: what will be written; shapes and types count, so tensors on the meta device do.
        max_shard_size: bytes of a file, or as "5GB"; a larger tensor has a file of its own.

    Raises:
        ConversionError: the disk has not enough room.
    """

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str):
        self._folder, self._tensors = folder, tensors
        tensors = {name: tensors[name] for name in sorted(tensors, key=_with_numbers)}
        self._split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        needed, free = self._split.metadata["total_size"], shutil.disk_usage(folder).free
        if needed > free:
            raise ConversionError(
                f"the disk of {folder.parent} needs {needed / 1e9:,.1f} GB for the weights; "
                f"{free / 1e9:,.1f} GB are free"
            )
        self._places: dict[str, tuple[Path, int]] = {}
        self._waiting = set(tensors)
        for file, names in self._split.filename_to_tensors.items():
            self._begin(folder / file, names)

    def _begin(self, path: Path, names: list[str]) -> None:
        """Writes the head of a file and gives it its length."""
        ranks = list(_NAMES)
        head, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names, key=lambda name: (ranks.index(self._tensors[name].dtype), name)):
            tensor, start = self._tensors[name], end
            end += tensor.numel() * tensor.dtype.itemsize
            offsets = {"data_offsets": [start, end]}
            head[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), **offsets}
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            self._places[name] = (path, 8 + len(text) + head[name]["data_offsets"][0])

    def write(self, name: str, portions: Iterable[torch.Tensor]) -> None:
        """Fills in one tensor; its numbers may come in several pieces, and in another type."""
        path, offset = self._places[name]
        dtype = self._tensors[name].dtype
        with open(path, "r+b") as file:
            file.seek(offset)
            for part in portions:
                file.write(part.detach().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
            written = file.tell() - offset
        if written != (expected := self._tensors[name].numel() * dtype.itemsize):
            raise ConversionError(f"{name} must have {expected} bytes; got {written}")
        self._waiting.discard(name)

    def finish(self) -> None:
        """Writes the index of several files.

        Raises:
            ConversionError: a tensor was never written.
        """
        if self._waiting:
            raise ConversionError(f"these weights were never written: {sorted(self._waiting)[:3]}")
        if self._split.is_sharded:
            count = sum(tensor.numel() for tensor in self._tensors.values())
            index = {
                "metadata": {"total_parameters": count, **self._split.metadata},
                "weight_map": self._split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / WEIGHTS_INDEX).write_text(text, encoding="utf-8")


def _with_numbers(name: str) -> list[tuple[bool, int | str]]:
    """A key that puts layer 2 before layer 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
