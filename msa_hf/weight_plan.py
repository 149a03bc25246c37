"""Which stored tensor becomes which weight of a converted model, and writing them all, one after the other.

The result is what Transformers would save after loading the whole model: names without "model." and buffers
of old checkpoints are understood, tied weights are written once, untrained routers are drawn.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils.logging import tqdm

from .modeling.configuration_msa import MSAConfig
from .modeling.errors import ConversionError
from .modeling.modeling_msa import MSAForCausalLM
from .training.adapter_merging import AdapterTensors
from .weight_streaming import StoredTensor, WeightFiles

logger = logging.getLogger(__name__)

ROUTER_SEED = 0
ROUTER = ".router_"  # a part of every router weight's name
_OLD_BUFFERS = r"rotary_emb\.inv_freq"  # older versions of Transformers saved what follows from the config


def empty_model(config: MSAConfig, dtype: torch.dtype) -> MSAForCausalLM:
    """A model with names, shapes and types, whose weights take no memory."""
    with torch.device("meta"):
        return MSAForCausalLM._from_config(config, dtype=dtype)


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The type of a checkpoint whose config names none: that of its first tensor, as Transformers decides."""
    return next(iter(stored.values())).dtype if stored else torch.float32


def match_weights(
    model: MSAForCausalLM, stored: Mapping[str, StoredTensor], may_lack: str | None = None
) -> dict[str, StoredTensor | None]:
    """The weights to write in the model's order, each with the tensor that it is read from.

    Args:
        model: what the weights must fit. may_lack: names with this part may be missing; their tensor is None.

    Raises:
        ConversionError: weights are missing, unknown, given twice, or of another shape.
    """
    expected = model.state_dict()
    ignored = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), _OLD_BUFFERS])
    found: dict[str, StoredTensor] = {}
    unknown = []
    for name, tensor in stored.items():
        own = _own_name(name, expected, model.base_model_prefix)
        if own in found:
            raise ConversionError(
                f"{tensor.file}: {found[own].name} and {name} are the same weight: remove one"
            )
        if own in expected:
            found[own] = tensor
        elif not re.search(ignored, name):
            unknown.append(name)
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != tuple(expected[name].shape)
    ]
    ties = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    for name, kept in ties.items():
        if name in found and kept in found and not _equal(found[name], found[kept], expected[kept].dtype):
            logger.warning(
                "%s and %s differ, although the config says tie_word_embeddings: both are kept", name, kept
            )
            continue
        expected.pop(name)
        if name in found:
            found.setdefault(kept, found.pop(name))
    missing = [name for name in expected if name not in found and not (may_lack and may_lack in name)]
    if missing or unknown or wrong:
        raise ConversionError(
            f"weights do not fit the architecture: missing {missing[:3]}, not used {sorted(unknown)[:3]}, "
            f"of another shape {wrong[:3]}"
        )
    return {name: found.get(name) for name in expected}


def write_weights(
    folder: Path,
    model: MSAForCausalLM,
    weights: Mapping[str, StoredTensor | None],
    adapter: AdapterTensors | None,
    max_shard_size: int | str,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes weights in the types of `model`, each as soon as it is read.

    Args:
        weights: as `match_weights` gives them; one without a tensor is the adapter's or is drawn.
        extra: further small tensors, which are no weights of the model.
    """
    expected, extra = model.state_dict(), dict(extra or {})
    files = WeightFiles(folder, {name: expected[name] for name in weights} | extra, max_shard_size)
    for name, tensor in extra.items():
        files.write(name, [tensor])
    changed = adapter.names if adapter is not None else set()
    drawn = [name for name, tensor in weights.items() if tensor is None and name not in changed]
    for name, tensor in tqdm(weights.items(), desc="Converting weights"):
        if name in changed:
            base = None if tensor is None else tensor.read().to(expected[name].dtype)
            files.write(name, [adapter.merged(name, base)])
        elif tensor is not None:
            files.write(name, tensor.portions())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(ROUTER_SEED)
        for name in drawn:
            files.write(name, [_drawn(model, name)])
    files.finish()


def _own_name(name: str, expected: Mapping[str, torch.Tensor], prefix: str) -> str:
    """What a tensor is called here: the prefix differs in checkpoints of a decoder without its head."""
    if name not in expected:
        for other in (f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if other in expected:
                return other
    return name


def _equal(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    return one.shape == other.shape and all(
        torch.equal(part.to(dtype), theirs.to(dtype))
        for part, theirs in zip(one.portions(), other.portions())
    )


def _drawn(model: MSAForCausalLM, name: str) -> torch.Tensor:
    """A new weight, initialised as the model initialises it; the model stays without memory."""
    module = model.get_submodule(name.rpartition(".")[0]).to_empty(device="cpu")
    model._init_weights(module)
    weight = module.weight.detach()
    module.to_empty(device="meta")
    return weight
