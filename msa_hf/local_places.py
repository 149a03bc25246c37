"""Places on this machine in an export's metadata, which nobody else needs to know."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .modeling.memory_files import replace_json
from .store.exchange import DOCUMENTS, INDEX

PLACES = ("source", "file")  # where ingestion notes the file that a document came from


def hide_places(folder: str | Path) -> int:
    """Makes absolute paths in an export's metadata relative to the folder that they have in common.

    "/home/ada/papers/1843.txt" becomes "1843.txt". Returns how many documents had one.
    """
    folder = Path(folder)
    folders = {os.path.dirname(path) for line in _lines(folder) for path in _places(line).values()}
    if not folders:
        return 0
    common = os.path.commonpath(sorted(folders))
    changed, digest, new = 0, hashlib.sha256(), folder / f"{DOCUMENTS}.new"
    with open(new, "wb") as file:
        for line in _lines(folder):
            places = _places(line)
            changed += bool(places)
            line["metadata"] |= {name: os.path.relpath(path, common) for name, path in places.items()}
            data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
            digest.update(data)
            file.write(data)
    os.replace(new, folder / DOCUMENTS)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    size = (folder / DOCUMENTS).stat().st_size
    index["files"][DOCUMENTS] = {"bytes": size, "sha256": digest.hexdigest()}
    replace_json(folder / INDEX, index, "new")
    return changed


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    with open(folder / DOCUMENTS, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _places(line: dict[str, Any]) -> dict[str, str]:
    found = {name: (line["metadata"] or {}).get(name) for name in PLACES}
    return {name: path for name, path in found.items() if isinstance(path, str) and os.path.isabs(path)}
