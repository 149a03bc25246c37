"""Presets as JSON files by folder (`models/`, `training/`, `evaluation/`); trained routers in `routers/`, and
calibrations of quantised caches in `caches/`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any


def presets(group: str) -> list[str]:
    """Names of the presets in a group, such as "models". Raises ValueError if there is no such group."""
    folder = files(__name__) / group
    if not folder.is_dir():
        raise ValueError(f"group must be a folder of presets, got {group!r}")
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def preset(group: str, name: str) -> dict[str, Any]:
    """One preset, such as preset("models", "smollm2-135m"). Raises ValueError, naming those that exist."""
    if name not in presets(group):
        raise ValueError(f"no preset {name!r} in {group!r}: choose one of {', '.join(presets(group))}")
    return json.loads((files(__name__) / group / f"{name}.json").read_text(encoding="utf-8"))


def routers_folder(name: str) -> Path:
    """Folder of a router adapter that this package ships, such as "smollm2-135m"; it need not exist."""
    return Path(str(files(__name__) / "routers" / name))


def caches_folder() -> Path:
    """Folder of the calibrations that this package ships, `<model>-<preset>` each."""
    return Path(str(files(__name__) / "caches"))
