"""TurboQuantCache: a key/value cache in 1 to 6 bits per number for any Transformers model.

    model.set_attn_implementation("turboquant")
    model.generate(**inputs, past_key_values=TurboQuantCache(model.config, key_bits=4, value_bits=3))

The first tokens, the newest ones and the most extreme ones of each head stay as they are; all others are
packed once (arXiv 2504.19874). With another attention implementation the cache works too, decoding itself at
every step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from .attention_turboquant import NAME as ATTENTION  # importing it registers the attention and mask functions
from .cache_calibration import calibrate
from .cache_files import SavedCache, architecture, check_same_model, read_cache, weights_of, write_cache
from .cache_report import CacheReport, report_cache
from .cache_settings import PRESETS, CacheSettings
from .calibration_files import Calibration, find_calibration
from .fitted_transforms import FittedTransforms
from .layer_turboquant import TurboQuantLayer


class TurboQuantCache(Cache):
    """A quantised cache to pass as `past_key_values`.

    Layers with a sliding window or linear attention keep the storage that Transformers gives them.

    Args:
        config: the model's configuration.
        preset: "4bit", "3bit", "2.7bit", "1.8bit", "paper-3.5", "paper-2.5", a calibration of this model, or
            settings to start from; "4bit" by default. For models that a calibration is registered for,
            "2.7bit" and "1.8bit" are calibrated.
        left_padding: [B], number of padding tokens before each row, or the attention mask [B, T] of the
            prompt.
            Without it padding is packed like any token, which is right but gives padded rows no sinks.
        offloading: keep layers on the CPU while they are not in use (CUDA only, see `Cache`).
        **changes: fields of `CacheSettings` that differ from the preset.

    Raises:
        ValueError: for a setting that is unknown, out of range or does not fit the model.
        MemoryMismatchError: the calibration is of a model of another shape.
    """

    def __init__(
        self,
        config: Any,
        preset: str | CacheSettings | Calibration = "4bit",
        *,
        left_padding: Any = None,
        offloading: bool = False,
        **changes: Any,
    ):
        settings, self.transforms = resolve_settings(preset, changes, config)
        self.architecture = architecture(config)
        decoder = config.get_text_config(decoder=True)
        self.settings = settings.for_model(decoder)
        kinds, arguments = get_layer_types_and_kwargs(decoder)
        self.settings.check_model(len(kinds), _key_value_heads(decoder, len(kinds)))
        padding = _row_starts(left_padding)
        dense = {layer % len(kinds) for layer in self.settings.dense_layers}
        layers = []
        for index, (kind, kwargs) in enumerate(zip(kinds, arguments)):
            native = DYNAMIC_LAYER_TYPE_MAPPING[kind]
            if native is DynamicLayer and index not in dense:
                layers.append(TurboQuantLayer(self.settings, index, padding, self.transforms))
            else:
                layers.append(native(**kwargs))
        super().__init__(layers=layers, offloading=offloading)

    # What model.set_attn_implementation takes, so that attention reads this cache as it is stored.
    attention_implementation = ATTENTION

    @staticmethod
    def calibrate(
        model: Any, texts: Sequence[str | Sequence[int]], average_bits: float = 2.7, **options: Any
    ) -> Calibration:
        """Bits for every layer and head, and transforms, chosen by what they do to the model's predictions.

        Takes minutes; see `cache_calibration.calibrate` for the options and errors.
        """
        return calibrate(model, texts, average_bits, **options)

    @property
    def packed_layers(self) -> list[TurboQuantLayer]:
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    def report(self) -> CacheReport:
        """Bytes of what this cache holds, and of the same tokens in bfloat16; print it for a table."""
        return report_cache(self)

    def save_pretrained(
        self, directory: str | Path, model: Any = None, entropy_coding: bool = False
    ) -> SavedCache:
        """Saves the cache to a directory; one that is there is replaced in one step, once this is complete.

        Args:
            model: the model that filled the cache. With it the file knows weights and dtype and not only the
                architecture, and refuses others.
            entropy_coding: makes codes and scales 5 to 10 % smaller, for archives (needs constriction).

        Returns:
            The bytes written, and what they would be without entropy coding.

        Raises:
            ValueError: a layer cannot be saved. MemoryMismatchError: `model` did not fill this cache.
            ImportError: constriction is not installed. Nothing is written in these cases.
        """
        if model is not None:
            check_same_model("this cache", self.architecture, architecture(model.config))
        padding = next((layer.left_padding for layer in self.packed_layers), None)
        weights = None if model is None else weights_of(model)
        return write_cache(
            directory,
            self.layers,
            self.settings,
            self.transforms,
            self.architecture,
            padding,
            weights,
            entropy_coding,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        model_or_config: Any,
        device: str | torch.device | None = None,
        *,
        offloading: bool = False,
    ) -> "TurboQuantCache":
        """The cache that `save_pretrained` wrote. It goes on exactly as the one that was saved.

        Args:
            model_or_config: the model that will use it, or its configuration; weights and dtype are compared
                only if the model is given here and was given when the cache was saved.
            device: where it goes; None for the model's device, or the CPU.
            offloading: see `TurboQuantCache`.

        Raises:
            FileNotFoundError: there is no cache. MemoryFormatError: it is damaged or of another format
            version. MemoryMismatchError: it was made by another model; the message says what differs.
            ImportError: it is entropy coded and constriction is not installed.
        """
        model = model_or_config if hasattr(model_or_config, "get_decoder") else None
        config = model_or_config if model is None else model.config
        stored = read_cache(directory, config, model)
        cache = cls(config, stored.settings, left_padding=stored.left_padding, offloading=offloading)
        cache.transforms = stored.transforms
        for layer in cache.packed_layers:
            layer.transforms = stored.transforms
        if device is None:
            device = "cpu" if model is None else model.device
        stored.fill(cache.layers, torch.device(device))
        return cache


def resolve_settings(
    preset: str | CacheSettings | Calibration, changes: dict[str, Any], config: Any
) -> tuple[CacheSettings, FittedTransforms | None]:
    """The settings of a preset with some fields changed, and transforms if the preset is calibrated.

    Raises ValueError for an unknown name or field, MemoryMismatchError for a calibration of another model.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if isinstance(preset, str) and not {"key_bits", "value_bits", "form"} & set(changes):
        preset = find_calibration(preset, config) or preset
    if isinstance(preset, str):
        return CacheSettings.from_dict(PRESETS[preset] | changes), None
    transforms = None
    if hasattr(preset, "transforms"):  # a Calibration, perhaps of another copy of this code
        preset.check_model(config)
        preset, transforms = preset.settings, preset.transforms
    return CacheSettings.from_dict(vars(preset) | changes) if changes else preset, transforms


def _key_value_heads(config: Any, layers: int) -> list[int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return list(heads) if isinstance(heads, (list, tuple)) else [heads] * layers


def _row_starts(left_padding: Any) -> list[int] | None:
    if left_padding is None:
        return None
    counts = torch.as_tensor(left_padding)
    if counts.ndim == 2:
        counts = (counts != 0).long().argmax(dim=1)
    if counts.ndim != 1 or counts.is_floating_point() or not len(counts) or (counts < 0).any():
        raise ValueError(
            "left_padding must hold the number of padding tokens before each row, or be the attention mask "
            f"[B, T]; got {left_padding!r}"
        )
    return counts.tolist()
