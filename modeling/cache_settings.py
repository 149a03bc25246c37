"""How a TurboQuantCache stores tokens: one frozen, JSON-able record, checked when it is made, and its
presets."""

from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Any

from .bit_packing import MOST_BITS
from .fitted_transforms import FittedTransforms
from .turboquant import SCALE_RULES, Transform, VectorQuantizer
from .turboquant_paper import PolarQuantizer, ProdQuantizer

BitSpec = int | str  # 4, or "1/4x3+3/4x2": fractions or numbers of channels x bits
BitMap = BitSpec | list  # one for all, or a list over layers of one, or a list over its heads

FORMS = ("mse", "prod", "polar")
ROTATIONS = ("hadamard", "haar", "none")


@dataclass(frozen=True)
class HeadCoding:
    """How some heads of a layer are coded; `sort_channels`: widest channels first, as the first tokens
    show."""

    heads: tuple[int, ...]
    quantizer: VectorQuantizer | ProdQuantizer | PolarQuantizer
    transform: Transform
    sort_channels: bool = False


@dataclass(frozen=True)
class CacheSettings:
    """Everything that decides the bytes of a TurboQuantCache.

    Args:
        key_bits, value_bits: bits per coordinate, 1-6, or parts such as "1/4x3+3/4x2" (a quarter of the
            channels, those with the most energy, in 3 bits and the rest in 2); or a list over layers of
            these, or of lists over heads.
        first_key_bits: bits of the first layer's keys, where models with biased keys have a few channels that
            are a hundred times as wide as the others; None for `key_bits`, see `for_model`.
        window: newest tokens kept in model precision, at least; `block` more gather before they are packed
            together.
        window_grows_from: length of the context from which the window grows, see `window_at`; None: never.
            A window that is wider than this length grows from its own length on.
        sinks: first tokens of every row kept as they are. extremes: further tokens of every head kept as they
            are, those with the longest keys or values so far.
        mean_group: tokens that share one mean, which is taken from their keys before coding; 0 for none.
        key_scale, value_scale: rule of the scales, see `VectorQuantizer`; "auto" is "unbiased" for values and
            for keys from 4 bits, and "matched_norm" for fewer bits, where a longer key costs more than a
            biased one.
        key_scale_bits, value_scale_bits: 8 or 16 for each scale. code_search: see `VectorQuantizer`.
        rotation: "hadamard" (random signs), "haar" or "none", made from `seed`.
        form: "mse"; "prod" (QJL on the residual) and "polar" (PolarQuant's angles) replay the papers.
        dense_layers: layers left in model precision, negative numbers from the end.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    key_bits: BitMap = 4
    value_bits: BitMap = 4
    first_key_bits: BitSpec | None = None
    window: int = 128
    window_grows_from: int | None = 1536
    block: int = 64
    sinks: int = 4
    extremes: int = 4
    mean_group: int = 256
    key_scale: str = "auto"
    value_scale: str = "auto"
    key_scale_bits: int = 8
    value_scale_bits: int = 8
    code_search: int = 9
    rotation: str = "hadamard"
    seed: int = 0
    form: str = "mse"
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.dense_layers, (tuple, list)) or not all(map(_whole, self.dense_layers)):
            raise ValueError(f"dense_layers must be whole numbers; got {self.dense_layers!r}")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, _as_lists(getattr(self, name)))
        for name, lowest in (
            ("seed", 0),
            ("window", 0),
            ("block", 1),
            ("sinks", 0),
            ("extremes", 0),
            ("mean_group", 0),
            ("code_search", 1),
        ):
            value = getattr(self, name)
            if not _whole(value) or value < lowest:
                raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}")
        start = self.window_grows_from
        if start is not None and not (_whole(start) and start >= 1):
            raise ValueError(f"window_grows_from must be None or a whole number of at least 1; got {start!r}")
        if self.mean_group % self.block:
            raise ValueError(f"mean_group must be a multiple of block = {self.block}; got {self.mean_group}")
        for name, known in (
            ("key_scale", ("auto", *SCALE_RULES)),
            ("value_scale", ("auto", *SCALE_RULES)),
            ("rotation", ROTATIONS),
            ("form", FORMS),
            ("key_scale_bits", (8, 16)),
            ("value_scale_bits", (8, 16)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
        for name in ("key_bits", "value_bits"):
            for spec in _leaves(getattr(self, name)):
                _check_spec(name, spec, self.form)
        if self.first_key_bits is not None:
            _check_spec("first_key_bits", self.first_key_bits, self.form)

    @property
    def exact_tokens(self) -> int:
        return self.sinks + self.extremes

    def window_at(self, length: int) -> int:
        """Newest tokens that a context of `length` tokens keeps in model precision, at least.

        It depends on the length alone (padding counts), and never grows by more than the context, so what is
        packed does not depend on how tokens arrive.
        """
        if self.window_grows_from is None:
            return self.window
        start = max(self.window_grows_from, self.window)
        if length <= start:
            return self.window
        return isqrt(self.window**2 * length // start)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `CacheSettings(**data)` reads it."""
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CacheSettings":
        """Raises ValueError for a field that this release does not know."""
        unknown = sorted(set(data) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"unknown cache settings: {', '.join(unknown)}")
        return cls(**data)

    def check_model(self, layers: int, heads: list[int]) -> None:
        """Raises ValueError if a bit map or `dense_layers` does not fit a model with these key/value
        heads."""
        for layer in self.dense_layers:
            if not -layers <= layer < layers:
                raise ValueError(f"dense_layers must be between {-layers} and {layers - 1}; got {layer}")
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, list):
                continue
            if len(bits) != layers:
                raise ValueError(f"{name} must name all {layers} layers of this model; got {len(bits)}")
            for layer, row in enumerate(bits):
                if isinstance(row, list) and len(row) != heads[layer]:
                    raise ValueError(
                        f"{name}[{layer}] must name all {heads[layer]} key/value heads; got {len(row)}"
                    )

    def for_model(self, config: Any) -> "CacheSettings":
        """These settings with `first_key_bits` chosen, where the model's keys have a bias (Qwen2, Phi, ...).

        The first layer of Qwen2.5-Coder-0.5B has two channels with 38 times the spread of the rest. Coded
        with the others on one scale they take the KL of 4 bit keys from .003 to .02, and that of 3 bit keys
        above 1. With the widest eighth of the channels on a scale of its own, and at least 4 bits, they do no
        harm.
        """
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = not isinstance(self.key_bits, list) and self.form == "mse" and self.rotation != "none"
        if self.first_key_bits is not None or not plain or dim % 16 or not has_biased_keys(config):
            return self
        fewest = min(bits for _, bits in parse_bits(self.key_bits, dim))
        rest = max(4, fewest)
        return replace(self, first_key_bits=f"1/8x{rest + (fewest < 4)}+7/8x{rest}")

    def specs(self, kind: str, layer: int, heads: int) -> list[BitSpec]:
        """Bits of each key/value head of a layer; kind is "keys" or "values"."""
        bits = self.key_bits if kind == "keys" else self.value_bits
        if kind == "keys" and layer == 0 and self.first_key_bits is not None:
            bits = self.first_key_bits
        row = bits[layer] if isinstance(bits, list) else bits
        return list(row) if isinstance(row, list) else [row] * heads

    def codings(
        self, kind: str, layer: int, heads: int, dim: int, fitted: FittedTransforms | None = None
    ) -> tuple[HeadCoding, ...]:
        """The heads of a layer, grouped by how they are coded; `fitted` transforms replace plain rotations.

        Raises ValueError if dim is odd or a spec does not divide it.
        """
        specs = self.specs(kind, layer, heads)
        codings = []
        for spec in dict.fromkeys(specs):
            members = tuple(head for head, own in enumerate(specs) if own == spec)
            parts = parse_bits(spec, dim)
            quantizer = self._quantizer(kind, parts)
            widths, sort = tuple(width for width, _ in parts), len(parts) > 1
            transform = _rotation(self.rotation, widths, self.seed)
            if fitted is not None and fitted.has(kind, layer):
                transform = fitted.transform(kind, layer, members, widths, self.rotation, self.seed)
                sort = False  # its coordinates are in order
            codings.append(HeadCoding(members, quantizer, transform, sort_channels=sort))
        return tuple(codings)

    def _quantizer(self, kind: str, parts: tuple[tuple[int, int], ...]):
        if self.form == "prod" and kind == "keys":
            return ProdQuantizer(parts, self.seed)
        if self.form == "polar":
            return PolarQuantizer(parts)
        keys = kind == "keys"
        rule, scale_bits = (
            (self.key_scale, self.key_scale_bits) if keys else (self.value_scale, self.value_scale_bits)
        )
        if rule == "auto":
            rule = "matched_norm" if keys and min(bits for _, bits in parts) < 4 else "unbiased"
        return VectorQuantizer(parts, rule, scale_bits, self.code_search)


# As the paper counts them (section 4.3): outlier channels one bit wider, two 16 bit scales, nothing else.
_PAPER = {
    "sinks": 0,
    "extremes": 0,
    "mean_group": 0,
    "key_scale": "least_squares",
    "value_scale": "least_squares",
    "key_scale_bits": 16,
    "value_scale_bits": 16,
    "code_search": 1,
    "rotation": "haar",
}
PRESETS: dict[str, dict[str, Any]] = {
    "4bit": {"key_bits": 4, "value_bits": 4},
    "3bit": {"key_bits": 3, "value_bits": 3},
    # For models without a calibration, within these bits from 64 dimensions on, scales and means counted.
    # On SmolLM2-135M KL .0062 and .0237; one width for all at no fewer bits has .0072 (3/2) and .0398 (2/1).
    "2.7bit": {"key_bits": "1/4x4+3/4x2", "value_bits": "1/4x3+3/4x2"},
    "1.8bit": {"key_bits": "1/4x3+3/4x1", "value_bits": "1/4x2+3/4x1"},
    "paper-3.5": dict.fromkeys(("key_bits", "value_bits", "first_key_bits"), "1/4x4+3/4x3") | _PAPER,
    "paper-2.5": dict.fromkeys(("key_bits", "value_bits", "first_key_bits"), "1/4x3+3/4x2") | _PAPER,
}


_BIAS_FIELDS = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "use_bias")
_BIASED_MODELS = ("qwen2", "phi", "gpt_neox", "opt", "gpt2", "gpt_bigcode")


def has_biased_keys(config: Any) -> bool:
    """Whether the key projection of a model has a bias, as far as its configuration tells."""
    named = any(getattr(config, field, False) is True for field in _BIAS_FIELDS)
    kind = getattr(config, "model_type", "")
    return named or kind in _BIASED_MODELS or kind.startswith("qwen2_")


@lru_cache(maxsize=256)
def parse_bits(spec: BitSpec, dim: int) -> tuple[tuple[int, int], ...]:
    """((channels, bits), ...) of a spec for vectors of `dim` channels.

    Raises ValueError if dim is odd, or the parts are not even numbers of channels that add up to dim.
    """
    if dim % 2:
        raise ValueError(f"head_dim must be even to be rotated; got {dim}")
    if isinstance(spec, int):
        return ((dim, spec),)
    parts = []
    for part in spec.split("+"):
        share, _, bits = part.partition("x")
        width = Fraction(share) * (dim if "/" in share else 1)
        parts.append((width, int(bits)))
    if sum(width for width, _ in parts) != dim or any(width % 2 for width, _ in parts):
        raise ValueError(f"{spec!r} does not cut head_dim {dim} into even numbers of channels")
    return tuple((int(width), bits) for width, bits in parts)


@lru_cache(maxsize=64)
def _rotation(kind: str, widths: tuple[int, ...], seed: int) -> Transform:
    return Transform.rotation(kind, widths, seed)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_lists(bits: Any) -> Any:
    """A copy of a bit map with lists for tuples, which is what JSON gives back."""
    return [_as_lists(row) for row in bits] if isinstance(bits, (list, tuple)) else bits


def _leaves(bits: BitMap):
    if isinstance(bits, list):
        for row in bits:
            yield from _leaves(row)
    else:
        yield bits


def _check_spec(name: str, spec: Any, form: str) -> None:
    most = MOST_BITS if form == "mse" else 4
    rule = f'{name} must be 1 to {most} bits, or parts like "1/4x3+3/4x2"'
    if isinstance(spec, str):
        try:
            bits = [
                (Fraction(part.partition("x")[0]), int(part.partition("x")[2])) for part in spec.split("+")
            ]
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{rule}; got {spec!r}") from None
        good = all(width > 0 and 1 <= value <= most for width, value in bits)
    else:
        good = _whole(spec) and 1 <= spec <= most
    if not good:
        raise ValueError(f"{rule}; got {spec!r}")
