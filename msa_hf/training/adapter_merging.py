"""A router adapter put into a checkpoint weight by weight, with the numbers that `load_router` gives."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from ..weight_streaming import StoredTensor, stored_tensors
from .adapter import PREFIX, WEIGHTS_FILE, check_shapes, place_routers, read_settings, router_weights

_LORA = ".lora_"


class AdapterTensors:
    """The tensors of a router adapter, each read when it is merged.

    Args:
        folder: as train-router writes it. model: one without memory, which gets the adapter's settings and
            router modules.

    Attributes:
        names: the weights that differ from the backbone's.

    Raises:
        ValueError: not a router adapter, one of another backbone, or one with tensors of another kind.
    """

    def __init__(self, folder: Path, model):
        self._folder = folder
        settings, tensors = read_settings(folder), stored_tensors([folder / WEIGHTS_FILE])
        check_shapes(model, settings, tensors, folder)
        place_routers(model, settings)
        model.config.routers_trained = True
        self._routers = {name: tensors.pop(PREFIX + name) for name in router_weights(model)}
        self._changes: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        known = model.state_dict()
        for key, tensor in tensors.items():
            weight = f"{key.removeprefix(PREFIX).partition(_LORA)[0]}.weight"
            if weight in known and known[weight].ndim == 2 and f"{_LORA}embedding" not in key:
                self._changes[weight][key] = tensor
            elif ".router_" not in key:  # routers of layers that the settings leave out are not used
                raise ValueError(f"{folder / WEIGHTS_FILE} may hold routers and LoRA only; got {key}")
        self.names = self._routers.keys() | self._changes.keys()

    def merged(self, name: str, base: torch.Tensor | None) -> torch.Tensor:
        """The weight with the adapter in it; base: the backbone's, which routers do not need."""
        if name in self._routers:
            return self._routers[name].read()
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(str(self._folder))
        # This is one layer, not the language model that the adapter was trained on.
        config.modules_to_save = config.task_type = config.base_model_name_or_path = None
        linear = nn.Linear(*reversed(base.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(base, requires_grad=False)
        module = linear
        for part in reversed(name.removesuffix(".weight").split(".")):
            module = nn.ModuleDict({part: module})
        adapted = get_peft_model(module, config)
        set_peft_model_state_dict(adapted, {key: own.read() for key, own in self._changes[name].items()})
        return adapted.merge_and_unload().get_submodule(name.removesuffix(".weight")).weight.detach()
