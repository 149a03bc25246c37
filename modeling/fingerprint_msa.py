"""Which weights made a memory or a cache."""

import hashlib

import torch
from torch import nn

_SAMPLES = 1024  # values hashed per tensor


def hash_weights(decoder: nn.Module, router_layers: list[int]) -> dict[str, str]:
    """Short hashes of the weights that a memory's vectors depend on; see `MSAForCausalLM.fingerprint`.

    Args:
        decoder: `MSAModel`; only layers up to the last router layer count.
    """
    parts = {"backbone": hashlib.sha256(), "routers": hashlib.sha256()}
    depth = router_layers[-1] + 1 if router_layers else 0
    for prefix, module in (("embed_tokens", decoder.embed_tokens), ("layers", decoder.layers[:depth])):
        for name, stored in sorted(effective_parameters(module).items()):
            part = parts["routers" if "router_" in name else "backbone"]
            part.update(_sample(f"{prefix}.{name}", _value(module, stored)))
    return {name: part.hexdigest()[:16] for name, part in parts.items()}


def hash_decoder(model: nn.Module) -> str:
    """Short hash of the weights that any Transformers model computes keys and values with.

    The same for a checkpoint in every floating-point type; an active PEFT adapter counts, the head does not.
    """
    digest, decoder = hashlib.sha256(), model.get_decoder()
    for name, stored in sorted(effective_parameters(decoder).items()):
        digest.update(_sample(name, _value(decoder, stored)))
    return digest.hexdigest()[:16]


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16).view(torch.int16)
    return f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes()


def _value(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter, read from where `device_map` has put it if that is the CPU's memory or a disk."""
    tensor = module.get_parameter(name)
    if not tensor.is_meta:
        return tensor
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(module, name)


def effective_parameters(module: nn.Module) -> dict[str, str]:
    """Parameters' names by those without PEFT's wrappers; an original that is replaced is left out."""
    found = {}
    for name, _ in module.named_parameters():
        if ".original_module." in name:
            continue
        parts = name.split(".")
        if "modules_to_save" in parts:
            index = parts.index("modules_to_save")
            parts = parts[:index] + parts[index + 2 :]
        found[".".join(part for part in parts if part != "base_layer")] = name
    return found
