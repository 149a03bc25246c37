"""Checkpoints of the reference implementation (EverMind-AI/MSA): what their files say besides the weights.

config.json is a Qwen3 config with model_type "msa" and a dict `msa_config`; the weights have Qwen3's names,
with the routers beside them and a scalar `temperature`, which is a constant of the loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .modeling.configuration_msa import MSAConfig, MSAReferenceConfig
from .modeling.errors import ConversionError
from .weight_streaming import stored_tensors, weight_files

MODEL_TYPE = MSAReferenceConfig.model_type
NOTES_FILE = (
    "msa_conversion.json"  # {"base_model": ..., "license": ...} for cards; and for `reference_export`:
)
CARRIED = "reference"  # {"config": config.json of the reference's checkpoint, "temperature": ...}
TEMPERATURE = "temperature"
# Losses on cosine scores. With any but the first, the reference itself infers with raw dot products.
_AS_TRAINED, _COSINE = "INFONCE", "INFONCE"


def read_reference(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder in the reference's layout; None of any other.

    Raises:
        ConversionError: it says that it is one, but not how its memory works.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Transformers finds better words for what is wrong
        return None
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        return None
    if not isinstance(config.get("msa_config"), dict):
        raise ConversionError(
            f'{folder / "config.json"} must hold msa_config beside model_type "{MODEL_TYPE}"; '
            f"got {config.get('msa_config')!r}"
        )
    return config


def open_loss(reference: dict[str, Any] | None) -> str | None:
    """The loss of a checkpoint that was trained with cosine scores but is inferred with raw dot products."""
    loss = (reference or {}).get("msa_config", {}).get("aux_loss_method", _AS_TRAINED)
    return loss if _COSINE in loss and loss != _AS_TRAINED else None


def reference_config(reference: dict[str, Any], memory_fields: dict[str, Any]) -> MSAConfig:
    """Our config of a reference checkpoint; `memory_fields` replace its own."""
    chosen = {"score_normalization": "cosine"} if open_loss(reference) else {}
    config = MSAReferenceConfig.from_dict(reference, **chosen)
    # Built anew, so that fields are checked together.
    return MSAConfig.from_dict({**config.to_dict(), **memory_fields})


def reference_notes(folder: Path) -> dict[str, Any]:
    """What a conversion must keep so that `reference_export` can write the same checkpoint again."""
    if (reference := read_reference(folder)) is None:
        return {}
    notes: dict[str, Any] = {"config": reference}
    tensor = stored_tensors(weight_files(folder)).get(TEMPERATURE)
    if tensor is not None:
        notes[TEMPERATURE] = temperature_notes(tensor.read())
    return {CARRIED: notes}


def temperature_notes(tensor: torch.Tensor) -> dict[str, Any]:
    """A small tensor as JSON; `temperature_tensor` reads it."""
    return {"value": tensor.tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def temperature_tensor(notes: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(notes["value"], dtype=getattr(torch, notes["dtype"]))
