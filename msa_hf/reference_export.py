"""Our checkpoints in the layout of the reference implementation (EverMind-AI/MSA), for its own code.

What our config holds is written as it is now. What it does not hold comes from the checkpoint that was
converted, if that was one of the reference's, else from its defaults. The settings that only our `generate`
knows (retrieval, prompt_format, answer_style, lexical_prior) have no place there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .modeling.configuration_msa import CHOICES, MSAConfig
from .modeling.errors import ConversionError
from .reference_layout import (
    CARRIED,
    MODEL_TYPE,
    NOTES_FILE,
    TEMPERATURE,
    open_loss,
    reference_config,
    temperature_tensor,
)
from .weight_plan import empty_model, match_weights, stored_dtype, write_weights
from .weight_streaming import MAX_SHARD_SIZE, finished_folder, free_destination, stored_tensors, weight_files

logger = logging.getLogger(__name__)

_BACKBONE_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id "
    "bos_token_id eos_token_id tie_word_embeddings attention_dropout attention_bias"
).split()
_MEMORY_FIELDS = {
    "top_k_docs": "top_k_documents",
    "pooling_kernel_size": "chunk_size",
    "decouple_router": "separate_router",
    "head_reduce_method": "head_reduction",
    "query_reduce_method": "query_reduction",
    "chunk_reduce_method": "chunk_reduction",
    "aux_loss_method": "aux_loss_method",
    "infonce_loss_temp": "aux_temperature",
    "auxloss_weight": "aux_loss_weight",
    "recloss_weight": "reconstruction_loss_weight",
    "ansloss_weight": "answer_loss_weight",
    "rewrite_position": "rewrite_positions",
}
_NOT_OURS = {"aux_loss": True, "decouple_pooling_mode": "mean"}
_OWN_SETTINGS = ("retrieval", "prompt_format", "answer_style", "lexical_prior")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def export_reference(
    model_folder: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    aux_loss_method: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a checkpoint of ours as the reference implementation lays it out, in portions as `convert` does.

    Args:
        model_folder: folder that `convert` or save_pretrained wrote, with its tokenizer.
        destination: folder to make; it must be absent or empty, and appears only when complete.
        aux_loss_method: in place of the config's. The reference scores documents by it: "INFONCE" with
            cosines, all others with raw dot products when it infers.
        max_shard_size: bytes of a file of weights, or as "5GB".

    Returns:
        `destination` as an absolute path.

    Raises:
        ConversionError: the layout cannot hold this model, files are missing, or the destination exists.
    """
    destination, folder = free_destination(destination), Path(model_folder)
    config = _own_config(folder)
    config.aux_loss_method = aux_loss_method or config.aux_loss_method
    _check_fits(config)
    stored = stored_tensors(weight_files(folder))
    dtype = config.dtype or stored_dtype(stored)
    model = empty_model(config, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    weights = match_weights(model, stored)
    carried = _carried(folder)
    exported = _exported_config(config, str(model.dtype).removeprefix("torch."), carried.get("config", {}))
    tokenizer = _tokenizer_config(folder)
    with finished_folder(destination) as made:
        write_weights(
            made, model, weights, None, max_shard_size, {TEMPERATURE: _temperature(config, carried)}
        )
        _write_json(made / "config.json", exported)
        _write_json(made / "tokenizer_config.json", tokenizer)
        for name in (*_TOKENIZER_FILES, "generation_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
    _say_what_differs(config, exported)
    return destination


def _own_config(folder: Path) -> MSAConfig:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"{folder} must be the folder of a converted model: {error}") from error
    if kind != MSAConfig.model_type:
        already = " It is in the reference's layout already" if kind == MODEL_TYPE else " Convert it first"
        raise ConversionError(
            f'{folder / "config.json"} must have model_type "{MSAConfig.model_type}"; got {kind!r}.{already}'
        )
    return MSAConfig.from_pretrained(folder)


def _check_fits(config: MSAConfig) -> None:
    """Raises ConversionError, naming every field whose value the reference has no place for."""
    if config.aux_loss_method not in CHOICES["aux_loss_method"]:
        raise ConversionError(
            f"aux_loss_method must be one of {', '.join(CHOICES['aux_loss_method'])}; "
            f"got {config.aux_loss_method!r}"
        )
    scores = ("dot",) if config.aux_loss_method == "BCE" else ("cosine",)
    if open_loss({"msa_config": {"aux_loss_method": config.aux_loss_method}}):
        scores = ("cosine", "dot")
    rules = {
        "backbone_type": ("qwen3",),
        "mlp_bias": (False,),
        "attention_out_bias": (config.attention_bias,),
        "router_chunk_size": (config.chunk_size,),
        "query_reduction": ("max", "mean", "last"),
        "score_normalization": scores,
        "consensus_weights": (None,),
    }
    broken = [
        f"{name} must be {' or '.join(map(repr, allowed))}; got {getattr(config, name)!r}"
        for name, allowed in rules.items()
        if getattr(config, name) not in allowed
    ]
    if not config.router_layers:
        broken.append("router_layers must name a layer; got []")
    if broken:
        raise ConversionError(f"the reference's layout cannot hold this model: {', and '.join(broken)}")


def _carried(folder: Path) -> dict[str, Any]:
    """What a conversion from the reference's layout has kept of it."""
    try:
        notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
        return notes.get(CARRIED) or {}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / NOTES_FILE} is damaged: {error}. Convert again") from error


def _exported_config(config: MSAConfig, dtype: str, carried: dict[str, Any]) -> dict[str, Any]:
    """config.json of the reference: `carried` where our config says nothing."""
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    own = {
        "model_type": MODEL_TYPE,
        "architectures": ["MSAForCausalLM"],
        **{name: getattr(config, name) for name in _BACKBONE_FIELDS},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else rope,
        "torch_dtype": dtype,
    }
    window = {
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
    }
    # A field that is None here and absent there was left to its default there.
    own = {name: value for name, value in own.items() if value is not None or name in carried}
    memory = {theirs: getattr(config, ours) for theirs, ours in _MEMORY_FIELDS.items()}
    kept = carried.get("msa_config", {})
    memory["lmloss_weight" if "lmloss_weight" in kept else "lmloss_weigth"] = config.lm_loss_weight
    every = config.router_layers == list(range(config.num_hidden_layers))
    memory["router_layer_idx"] = "all" if every else ",".join(map(str, config.router_layers))
    return {"rope_scaling": None, **window, **carried, **own, "msa_config": {**_NOT_OURS, **kept, **memory}}


def _temperature(config: MSAConfig, carried: dict[str, Any]) -> torch.Tensor:
    """The loss temperature as the reference saves it; the one carried along, unless it has changed since."""
    kept = carried.get("config", {}).get("msa_config", {}).get("infonce_loss_temp", config.aux_temperature)
    if TEMPERATURE in carried and kept == config.aux_temperature:
        return temperature_tensor(carried[TEMPERATURE])
    return torch.tensor(config.aux_temperature, dtype=torch.float32)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json in the words of Transformers 4, which the reference runs on."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder} has no tokenizer that can be read: {error}") from error
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := settings.pop("extra_special_tokens", None), list):
        settings["additional_special_tokens"] = extra
    elif extra is not None:
        settings["extra_special_tokens"] = extra
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings.setdefault("chat_template", template.read_text(encoding="utf-8"))
    return settings


def _say_what_differs(config: MSAConfig, exported: dict[str, Any]) -> None:
    if config.score_normalization == "cosine" and (loss := open_loss(exported)):
        logger.warning(
            "the reference infers with raw dot products where aux_loss_method is %s, and this model's scores "
            "are cosines: export with aux_loss_method INFONCE to have cosines there, too",
            loss,
        )
    if not config.routers_trained:
        logger.warning("the routers of this model are untrained: they select at chance there, too")
    theirs = reference_config(exported, {})
    left = [name for name in _OWN_SETTINGS if getattr(config, name) != getattr(theirs, name)]
    if left:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in left)
        logger.warning("the reference's layout has no place for %s", values)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
