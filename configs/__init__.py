"""Presets as JSON files, by folder (`models/`, `training/`, `evaluation/`), and trained routers."""

import json
from importlib.resources import files
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
