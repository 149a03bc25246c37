"""Trained routers as a PEFT adapter: full router weights through `modules_to_save`, with or without LoRA.

Beside PEFT's files the folder holds msa_router.json, the settings that the weights were trained for;
`load_router` applies both. PeftModel.from_pretrained and model.load_adapter load the weights alone, for a
model that already has these settings.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

ROUTERS = ("router_q_proj", "router_k_proj")
SETTINGS_FILE, WEIGHTS_FILE = "msa_router.json", "adapter_model.safetensors"
FEATURES_FOLDER = "features"  # beside them: states of the backbone, kept for later runs of the training
SETTINGS = (
    "router_layers", "chunk_size", "router_chunk_size", "score_normalization", "head_reduction",
    "query_reduction", "chunk_reduction", "consensus_weights",
)  # fmt: skip
# PEFT's own name for "no target module, only modules_to_save"; other names without a match are errors.
NO_TARGETS = "dummy-target-modules"
PREFIX = "base_model.model."


def router_peft_config(model, lora_rank: int = 0, lora_alpha: int | None = None):
    """LoraConfig with the routers in `modules_to_save`, and LoRA on attention below the last router layer."""
    from peft import LoraConfig

    targets = NO_TARGETS
    if lora_rank:
        layers = "|".join(str(layer) for layer in range(model.config.router_layers[-1]))
        targets = rf".*\.layers\.({layers})\.self_attn\.(q|k|v|o)_proj"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank or 1,
        lora_alpha=lora_alpha or 2 * (lora_rank or 1),
        target_modules=targets,
        modules_to_save=list(ROUTERS),
    )


def save_router_adapter(model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the routers of `model`, in `dtype`, and its routing settings as a PEFT adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = router_peft_config(model)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {
        f"{PREFIX}{name}": weight.detach().to("cpu", dtype).contiguous()
        for name, weight in router_weights(model).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_settings(model.config, folder)


def write_settings(config, folder: Path) -> None:
    """Writes the routing settings that go with an adapter's weights."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_router(model, folder: str | Path):
    """Puts trained routers into `model`: settings, weights, and `config.routers_trained`. Returns the model.

    Routers alone are copied in place and need no PEFT. An adapter with LoRA weights is merged by PEFT.

    Args:
        model: `MSAForCausalLM` on the backbone that the routers were trained on; router layers may differ.

    Raises:
        ValueError: not a router adapter, or one of another backbone.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _incomplete(folder, error) from error
    check_shapes(model, settings, tensors, folder)
    place_routers(model, settings)
    if any("lora_" in name for name in tensors):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    else:
        with torch.no_grad():
            for name, weight in router_weights(model).items():
                weight.copy_(tensors[PREFIX + name])
    model.config.routers_trained = True
    return model


def read_settings(folder: Path) -> dict:
    """The routing settings of an adapter.

    Raises:
        ValueError: they are missing or not as `write_settings` writes them.
    """
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _incomplete(folder, error) from error
    if unknown := set(SETTINGS) ^ set(settings):
        raise ValueError(
            f"{folder / SETTINGS_FILE} must hold exactly {', '.join(SETTINGS)}; differs in {sorted(unknown)}"
        )
    return settings


def _incomplete(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} must hold {SETTINGS_FILE} and {WEIGHTS_FILE}, as train-router writes them: {error}"
    )


def place_routers(model, settings: dict) -> None:
    """Gives `model` the routing `settings` and router modules in just those layers, new ones with zeros."""
    config = model.config
    # Raises ValueError on bad settings before anything has changed.
    candidate = {**config.to_dict(), **settings}
    type(config).from_dict({**candidate, "routers_trained": False})
    for name, value in settings.items():
        setattr(config, name, value)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name, heads in zip(ROUTERS, (config.num_attention_heads, config.num_key_value_heads)):
            if index not in config.router_layers:
                if hasattr(attention, name):
                    delattr(attention, name)
            elif not hasattr(attention, name):
                like = attention.q_proj.weight
                linear = nn.Linear(
                    config.hidden_size, heads * config.head_dim, False, device=like.device, dtype=like.dtype
                )
                setattr(attention, name, nn.Sequential(linear.requires_grad_(like.requires_grad)))
                nn.init.zeros_(linear.weight)


def router_weights(model) -> dict[str, torch.Tensor]:
    """Router parameters by name, router_q_proj [H * D, E] and router_k_proj [G * D, E] per router layer."""
    return {
        f"model.layers.{layer}.self_attn.{name}.0.weight": getattr(model.model.layers[layer].self_attn, name)[
            0
        ].weight
        for layer in model.config.router_layers
        for name in ROUTERS
    }


def check_shapes(model, settings: dict, tensors: Mapping, folder: Path) -> None:
    """Raises ValueError unless `tensors`, of which only shapes count, hold routers that fit `model`."""
    config = model.config
    for layer in settings["router_layers"]:
        for name, heads in zip(ROUTERS, (config.num_attention_heads, config.num_key_value_heads)):
            key = f"{PREFIX}model.layers.{layer}.self_attn.{name}.0.weight"
            expected, found = (heads * config.head_dim, config.hidden_size), tensors.get(key)
            if found is None or tuple(found.shape) != expected:
                raise ValueError(
                    f"{folder} must hold {key} of shape {expected} to fit this model; found "
                    f"{found if found is None else tuple(found.shape)}. Was it trained on another backbone?"
                )
