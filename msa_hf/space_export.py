"""The package as files beside a Space's app.py: msa_hf is on no index, so a Space brings it along."""

import importlib.util
from pathlib import Path

from .outgoing import OutgoingFile, check_file

PACKAGE = "msa_hf"
# Each may lie elsewhere in a checkout; installed, they lie in one another.
_PARTS = (PACKAGE, f"{PACKAGE}.configs", f"{PACKAGE}.kernels", f"{PACKAGE}.modeling", f"{PACKAGE}.space_app")
_SUFFIXES = {".py", ".json", ".jsonl", ".safetensors", ".css", ".txt", ".md"}


def package_files() -> list[OutgoingFile]:
    """All files of this package as an installation has them, below "msa_hf/", each of them checked.

    Raises PushRefusedError for a file that must not leave this machine.
    """
    files: dict[str, OutgoingFile] = {}
    for part in _PARTS:
        folder = Path(importlib.util.find_spec(part).submodule_search_locations[0])
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _SUFFIXES:
                name = f"{part.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
                files[name] = check_file(path, name)
    return [files[name] for name in sorted(files)]
