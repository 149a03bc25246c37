"""A calibration: how a TurboQuantCache spends its bits on one model. Its files, and those that are shipped.

calibration.json holds settings and bit maps and is enough by itself where no transforms were fitted;
calibration.safetensors holds these. Axis letters: G key/value heads, D head dim.
"""

import hashlib
import json
import logging
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .cache_files import architecture, differing_fields
from .cache_settings import PRESETS, CacheSettings
from .checkpoint_code import CALIBRATION_FILES, calibration_beside
from .errors import MemoryFormatError, MemoryMismatchError
from .fitted_transforms import FittedTransforms
from .memory_files import (
    check_file_name,
    check_size,
    file_sha256,
    read_format,
    replace_json,
    write_tensors,
)

logger = logging.getLogger(__name__)

FORMAT = "msa_hf cache calibration"
FORMAT_VERSION = 1
TENSORS, INDEX = CALIBRATION_FILES
_folders: list[Path] = []


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found for a model, to be given to `TurboQuantCache(config, calibration)`.

    Args:
        settings: bits of every head, as parts. model: the fields of the configuration that must fit.
        transforms: what was fitted to the heads; None for bit maps alone.
        weights: fingerprint of the weights, for information: finetuned ones may share a calibration.
        details: bits promised and how they are counted, predicted and measured KL, tokens of the texts.
    """

    settings: CacheSettings
    model: dict[str, Any]
    transforms: FittedTransforms | None
    weights: str
    details: dict[str, Any]

    def check_model(self, config: Any) -> None:
        """Raises MemoryMismatchError, naming the fields, if a model has another shape."""
        if differing := differing_fields(self.model, identity(config)):
            raise MemoryMismatchError(
                f"this calibration is of another model: {'; '.join(differing)}. Make one for this model with "
                "TurboQuantCache.calibrate or msa-hf calibrate-cache"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes calibration.json and, if there are transforms, calibration.safetensors."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        stored, path = None, directory / TENSORS
        if self.transforms is not None:
            write_tensors(path, self.transforms.matrices)
            stored = {"name": TENSORS, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": self.settings.to_dict(),
            "model": self.model,
            "weights": self.weights,
            "details": self.details,
            "transforms": stored,
        }
        replace_json(directory / INDEX, index, uuid.uuid4().hex[:12])
        if stored is None:
            path.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Calibration":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: there is no calibration. MemoryFormatError: it is damaged, or of another format
            version.
        """
        directory = Path(directory)
        if not (directory / INDEX).is_file():
            raise FileNotFoundError(f"no calibration in {directory}: {INDEX} is missing")
        try:
            index = read_format(directory / INDEX, FORMAT, FORMAT_VERSION)
            settings, model = CacheSettings.from_dict(index["settings"]), dict(index["model"])
            transforms = index["transforms"] and _read_transforms(directory, index["transforms"])
            return cls(settings, model, transforms, str(index["weights"]), dict(index["details"]))
        except MemoryFormatError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError, RecursionError) as error:
            raise MemoryFormatError(
                f"the calibration in {directory} is damaged: {error!r}. Make it again."
            ) from error

    @property
    def sha256(self) -> str:
        """Digest of what decides the bytes of a cache."""
        digest = hashlib.sha256(json.dumps(self.settings.to_dict(), sort_keys=True).encode())
        for name, matrix in sorted((self.transforms.matrices if self.transforms else {}).items()):
            digest.update(name.encode() + matrix.contiguous().view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()


def identity(config: Any) -> dict[str, Any]:
    """The fields of a model's configuration that a calibration depends on, as plain JSON."""
    decoder = config.get_text_config(decoder=True)
    found = architecture(config)
    # A model with memory has the keys and values of its backbone.
    found["model_type"] = getattr(decoder, "backbone_type", None) or found["model_type"]
    heads = found["num_attention_heads"]
    found["head_dim"] = found["head_dim"] or decoder.hidden_size // heads
    found["num_key_value_heads"] = found["num_key_value_heads"] or heads
    for name in ("vocab_size", "intermediate_size"):
        found[name] = getattr(decoder, name, None)
    return json.loads(json.dumps(found))


def register_calibrations(folder: str | Path) -> None:
    """Makes the calibrations in the folders of `folder` known; `<model>-<preset>` serves a named preset.

    Nothing is read until a preset is asked for.
    """
    if Path(folder) not in _folders:
        _folders.append(Path(folder))


def find_calibration(preset: str, config: Any) -> Calibration | None:
    """The calibration of exactly this architecture for a named preset: what lies beside its checkpoint, else
    what is registered; None if there is none."""
    if preset in (getattr(config, "calibrated_presets", None) or ()):
        directory = calibration_beside(preset, config)
        if directory is not None and (calibration := _shipped(directory)).model == identity(config):
            return calibration
        logger.warning(
            "%s: no calibration is beside %s, as its config.json says", preset, config.name_or_path
        )
    directory = _registered_folder(preset, config)
    return None if directory is None else _shipped(directory)


def _registered_folder(preset: str, config: Any) -> Path | None:
    own = None
    for folder in _folders:
        for path in sorted(folder.glob(f"*-{preset}/{INDEX}")):
            own = own or identity(config)
            if _shipped(path.parent).model == own:
                logger.info("%s: the calibration in %s", preset, path.parent)
                return path.parent
    return None


def registered_calibrations(config: Any) -> dict[str, Path]:
    """The folders of all registered calibrations of exactly this architecture, by preset."""
    found = {preset: _registered_folder(preset, config) for preset in PRESETS}
    return {preset: folder for preset, folder in found.items() if folder is not None}


@lru_cache(maxsize=16)
def _shipped(directory: Path) -> Calibration:
    return Calibration.from_pretrained(directory)


def _read_transforms(directory: Path, stored: dict[str, Any]) -> FittedTransforms:
    path = directory / check_file_name(stored["name"], INDEX)
    check_size(path, stored["bytes"])
    if file_sha256(path) != stored["sha256"]:
        raise MemoryFormatError(f"{path} is damaged: its SHA-256 differs from {INDEX}")
    matrices = load_file(path)
    for name, matrix in matrices.items():
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or not matrix.isfinite().all():
            raise MemoryFormatError(f"{name} must hold finite square matrices; got {list(matrix.shape)}")
    return FittedTransforms(matrices)
