"""What lets a checkpoint stand alone: its code, the classes that Auto classes load, and what these need.

Transformers copies the files of modeling/ beside the weights. What it does not do is done here, when the
configuration is written: it names only the class that is saved; it copies the file that imports the kernels
from msa_hf, which would find nothing elsewhere; and it knows nothing of calibrations of TurboQuantCache.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

CODE = "modeling_msa.py"
KERNELS = "triton_ops.py"
AUTO_MAP = {
    "AutoConfig": "configuration_msa.MSAConfig",
    "AutoModel": "modeling_msa.MSAModel",
    "AutoModelForCausalLM": "modeling_msa.MSAForCausalLM",
    # A language model decides by the logits of its answers. This is also the only Auto class that
    # `transformers serve` asks; it finds no other class outside of Transformers.
    "AutoModelForDecision": "modeling_msa.MSAForCausalLM",
}
CALIBRATIONS = "calibrations"  # a folder with one folder for each preset
CALIBRATION_FILES = ("calibration.safetensors", "calibration.json")  # the former where something was fitted
_registered: dict[str, Callable | None] = {"kernels": None, "calibrations": None}


def register_kernel_source(source: Callable[[], str]) -> None:
    """source(): the text of one file with all Triton kernels. Remote code has that file already, and copies
    it."""
    _registered["kernels"] = source


def register_calibration_source(source: Callable[[Any], dict[str, Path]]) -> None:
    """source(config): the folders of known calibrations of a model, by preset. Remote code copies those that
    its checkpoint has."""
    _registered["calibrations"] = source


def complete_code(folder: str | Path, config: Any) -> None:
    """Puts kernels and calibrations into a folder that holds the models' code, and says so in the
    configuration.

    Classes that are named already stay, except those of a repository that this one was loaded from.
    Elsewhere nothing happens.
    """
    folder = Path(folder)
    if not (folder / CODE).is_file():
        return
    if _registered["kernels"] is not None:
        (folder / KERNELS).write_text(_registered["kernels"](), encoding="utf-8")
    found = {} if _registered["calibrations"] is None else _registered["calibrations"](config)
    own = {preset: calibration_beside(preset, config) for preset in config.calibrated_presets or ()}
    found |= {preset: source for preset, source in own.items() if source is not None}
    for preset, source in found.items():
        _copy_calibration(source, folder / CALIBRATIONS / preset)
    config.calibrated_presets = sorted(found) or None
    named = (getattr(config, "auto_map", None) or {}).items()
    given = {name: own for name, own in named if name not in AUTO_MAP or "--" not in own}
    config.auto_map = {**AUTO_MAP, **given}


def calibration_beside(preset: str, config: Any) -> Path | None:
    """The folder of a calibration in the checkpoint that a configuration was read from, or None.

    The checkpoint is a folder, or a repository at the commit of the configuration.
    """
    index = None
    for name in CALIBRATION_FILES:
        index = cached_file(
            config.name_or_path,
            f"{CALIBRATIONS}/{preset}/{name}",
            revision=getattr(config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if index is None else Path(index).parent


def _copy_calibration(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in CALIBRATION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
