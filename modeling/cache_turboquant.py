"""TurboQuantCache: a key/value cache in 1 to 4 bits per number for any Transformers model.

    model.set_attn_implementation("turboquant")
    model.generate(**inputs, past_key_values=TurboQuantCache(model.config, key_bits=4, value_bits=3))

The first tokens, the newest ones and the most extreme ones of each head stay as they are; all others are
packed once (arXiv 2504.19874). With another attention implementation the cache works too, decoding itself at
every step.
"""

from dataclasses import replace
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from .attention_turboquant import NAME as ATTENTION  # importing it registers the attention and mask functions
from .cache_settings import PRESETS, CacheSettings
from .layer_turboquant import TurboQuantLayer


class TurboQuantCache(Cache):
    """A quantised cache to pass as `past_key_values`.

    Layers with a sliding window or linear attention keep the storage that Transformers gives them.

    Args:
        config: the model's configuration.
        preset: "4bit", "3bit", "paper-3.5", "paper-2.5", or settings to start from; "4bit" by default.
        left_padding: [B], number of padding tokens before each row, or the attention mask [B, T] of the
            prompt.
            Without it padding is packed like any token, which is right but gives padded rows no sinks.
        offloading: keep layers on the CPU while they are not in use (CUDA only, see `Cache`).
        **changes: fields of `CacheSettings` that differ from the preset.

    Raises:
        ValueError: for a setting that is unknown, out of range or does not fit the model.
    """

    def __init__(
        self,
        config: Any,
        preset: str | CacheSettings = "4bit",
        *,
        left_padding: Any = None,
        offloading: bool = False,
        **changes: Any,
    ):
        self.settings = resolve_settings(preset, changes)
        decoder = config.get_text_config(decoder=True)
        kinds, arguments = get_layer_types_and_kwargs(decoder)
        self.settings.check_model(len(kinds), _key_value_heads(decoder, len(kinds)))
        padding = _row_starts(left_padding)
        dense = {layer % len(kinds) for layer in self.settings.dense_layers}
        layers = []
        for index, (kind, kwargs) in enumerate(zip(kinds, arguments)):
            native = DYNAMIC_LAYER_TYPE_MAPPING[kind]
            if native is DynamicLayer and index not in dense:
                layers.append(TurboQuantLayer(self.settings, index, padding))
            else:
                layers.append(native(**kwargs))
        super().__init__(layers=layers, offloading=offloading)

    # What model.set_attn_implementation takes, so that attention reads this cache as it is stored.
    attention_implementation = ATTENTION

    @property
    def packed_layers(self) -> list[TurboQuantLayer]:
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]


def resolve_settings(preset: str | CacheSettings, changes: dict[str, Any]) -> CacheSettings:
    """The settings of a preset with some fields changed. Raises ValueError for an unknown name or field."""
    if isinstance(preset, CacheSettings):
        return replace(preset, **changes) if changes else preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    return CacheSettings.from_dict(PRESETS[preset] | changes)


def _key_value_heads(config: Any, layers: int) -> list[int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return list(heads) if isinstance(heads, (list, tuple)) else [heads] * layers


def _row_starts(left_padding: Any) -> list[int] | None:
    if left_padding is None:
        return None
    if getattr(left_padding, "ndim", 1) == 2:
        left_padding = (left_padding != 0).long().argmax(dim=1)
    return [int(count) for count in left_padding]
