"""A naive twin of TurboQuantCache: one sequence at a time, one block at a time, decoded tensors for eager
attention.

It shares the quantiser (`modeling/turboquant.py`) and the settings with the cache, and nothing else: what is
recent, what is packed with which mean, and which tokens stay exact is worked out here by plain loops.
"""

import copy

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from msa_hf.modeling.cache_settings import CacheSettings, parse_bits
from msa_hf.modeling.turboquant import Transform, VectorQuantizer, dequantize, quantize


class TwinRow:
    """One sequence of one layer. Axis letters: G key/value heads, T tokens, D head dim."""

    def __init__(self, settings: CacheSettings, layer: int, padding: int):
        self.settings, self.layer, self.padding = settings, layer, padding
        self.raw: dict[str, torch.Tensor] = {}  # keys, values [G, T, D] as they came
        self.read: dict[str, list[torch.Tensor]] = {}  # per head: packed tokens [P, D] from their codes
        self.means: list[torch.Tensor] = []  # [G, D]
        self.exact: list[dict[int, float]] = []  # per head: position -> how extreme
        self.norms = torch.empty(0)  # [G, 2]
        self.orders: dict[tuple[str, int], torch.Tensor] = {}
        self.gains: dict[tuple[str, int], float] = {}

    @property
    def length(self) -> int:
        return self.raw["keys"].shape[1] if self.raw else 0

    @property
    def packed(self) -> int:
        return len(self.read["keys"][0]) if self.raw else 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens [G, T, D]; all are read before any of them is packed."""
        before = self.length
        if not self.raw:
            heads = range(keys.shape[0])
            self.raw = {"keys": keys[:, :0], "values": values[:, :0]}
            self.read = {kind: list(states) for kind, states in self.raw.items()}
            self.exact = [{} for _ in heads]
        self.raw = {
            "keys": torch.cat([self.raw["keys"], keys], dim=1),
            "values": torch.cat([self.raw["values"], values], dim=1),
        }
        read = self.dense("keys"), self.dense("values")
        for length in range(before + 1, self.length + 1):  # as if the tokens had come one by one
            self.pack({kind: states[:, :length] for kind, states in self.raw.items()})
        return read

    def dense(self, kind: str) -> torch.Tensor:
        states = self.raw[kind].clone()
        for head, tokens in enumerate(self.read[kind]):
            coded = [position for position in range(len(tokens)) if position not in self.exact[head]]
            states[head, coded] = tokens[coded]
        return states

    def pack(self, raw: dict[str, torch.Tensor]) -> None:
        s = self.settings
        length, window = raw["keys"].shape[1], s.window
        if s.window_grows_from is not None:
            start = max(s.window, s.window_grows_from)
            while (window + 1) ** 2 * start <= s.window**2 * length:
                window += 1
        target = (length - window) // s.block * s.block
        while self.packed < target:
            begin, end = self.packed, min(target, (self.packed // s.block + 1) * s.block)
            self.pack_block(raw, begin, end)

    def pack_block(self, raw: dict[str, torch.Tensor], begin: int, end: int) -> None:
        s, heads = self.settings, range(raw["keys"].shape[0])
        first = begin == 0 or begin <= self.padding < end  # the row's first real tokens, or only padding
        vectors = {kind: states[:, begin:end].double() for kind, states in raw.items()}
        if s.mean_group:
            group = begin // s.mean_group
            if group == len(self.means):
                self.means.append(self.mean(raw["keys"], begin))
            elif first:
                self.means[group] = self.mean(raw["keys"], begin)
            vectors["keys"] = vectors["keys"] - self.means[group][:, None].double()
        real = [t for t in range(begin, end) if t >= self.padding] or list(range(begin, end))
        reference = {kind: states[:, [t - begin for t in real]] for kind, states in vectors.items()}
        self.keep_exact(vectors, reference, begin, first)
        for kind, states in vectors.items():
            for head in heads:
                if first:
                    self.settle(kind, head, reference[kind][head])
                decoded = self.round_trip(kind, head, states[head])
                if kind == "keys" and s.mean_group:
                    decoded = decoded + self.means[group][head].float()
                self.read[kind][head] = torch.cat([self.read[kind][head], decoded.to(raw[kind].dtype)])

    def mean(self, keys: torch.Tensor, begin: int) -> torch.Tensor:
        s = self.settings
        near = range(begin, begin + min(s.mean_group, s.window + s.block))
        real = [t for t in near if t >= self.padding]
        chosen = [t for t in real if t >= self.padding + s.sinks] or real or list(near)
        return keys[:, chosen].double().mean(dim=1).bfloat16()

    def keep_exact(self, vectors, reference, begin: int, first: bool) -> None:
        def lengths(states):
            return torch.stack([states["keys"].square().sum(-1), states["values"].square().sum(-1)], dim=-1)

        if first:
            self.norms = lengths(reference).median(dim=1).values.clamp_min(1e-30)
        extreme = (lengths(vectors) / self.norms[:, None]).amax(-1).float()
        for head, tokens in enumerate(self.exact):
            for i, score in enumerate(extreme[head].tolist()):
                number = begin + i - self.padding
                if number >= 0:
                    tokens[begin + i] = float("inf") if number < self.settings.sinks else score
            while len(tokens) > self.settings.sinks + self.settings.extremes:
                tokens.pop(min(tokens, key=lambda t: (tokens[t], -t)))

    def settle(self, kind: str, head: int, states: torch.Tensor) -> None:
        """The first tokens [T, D] of a head decide its order of channels and its gain."""
        bits = self.settings.key_scale_bits if kind == "keys" else self.settings.value_scale_bits
        size = states.square().mean(dim=1).median().sqrt().clamp(1e-30, 1e30)
        self.gains[kind, head] = float(size.log2().round().exp2()) if bits == 8 else 1.0
        order = states.square().mean(dim=0).argsort(descending=True, stable=True)
        parts = parse_bits(self.settings.specs(kind, self.layer, len(self.exact))[head], states.shape[1])
        self.orders[kind, head] = order if len(parts) > 1 else torch.arange(states.shape[1])

    def round_trip(self, kind: str, head: int, states: torch.Tensor) -> torch.Tensor:
        """What is read from the codes of one head's vectors [T, D]."""
        s = self.settings
        parts = parse_bits(s.specs(kind, self.layer, len(self.exact))[head], states.shape[1])
        rule, bits = (
            (s.key_scale, s.key_scale_bits) if kind == "keys" else (s.value_scale, s.value_scale_bits)
        )
        if rule == "auto":
            short = kind == "keys" and any(width_bits < 4 for _, width_bits in parts)
            rule = "matched_norm" if short else "unbiased"
        transform = Transform.rotation(s.rotation, tuple(width for width, _ in parts), s.seed)
        order, gain = self.orders[kind, head], self.gains[kind, head]
        quantizer = VectorQuantizer(parts, rule, bits, s.code_search)
        packed = quantize(states[:, order] / gain, quantizer, transform)
        decoded = torch.empty(states.shape)
        decoded[:, order] = dequantize(packed, transform) * gain
        return decoded

    def copy(self) -> "TwinRow":
        """Tensors are never written into, so containers are all that has to be copied."""
        other = copy.copy(self)
        other.read = {kind: list(heads) for kind, heads in self.read.items()}
        other.exact = [dict(tokens) for tokens in self.exact]
        other.means, other.orders, other.gains = list(self.means), dict(self.orders), dict(self.gains)
        return other

    def crop(self, length: int) -> None:
        if length == 0:
            self.__init__(self.settings, self.layer, self.padding)
            return
        self.raw = {kind: states[:, :length] for kind, states in self.raw.items()}
        self.read = {kind: [tokens[:length] for tokens in heads] for kind, heads in self.read.items()}
        self.exact = [{t: score for t, score in tokens.items() if t < length} for tokens in self.exact]
        if self.settings.mean_group:
            self.means = self.means[: -(-self.packed // self.settings.mean_group)]


class TwinLayer(DynamicLayer):
    """The rows of one layer; `keys` and `values` are what attention may read."""

    def __init__(self, settings: CacheSettings, index: int, padding: list[int] | None = None):
        super().__init__()
        self.settings, self.index, self.padding = settings, index, padding
        self.rows: list[TwinRow] = []

    def update(self, key_states, value_states, *args, **kwargs):
        batch = key_states.shape[0]
        if not self.rows:
            padding = torch.tensor(self.padding or [0]).repeat_interleave(batch // len(self.padding or [0]))
            self.rows = [TwinRow(self.settings, self.index, int(count)) for count in padding]
        read = [row.append(*states) for row, states in zip(self.rows, zip(key_states, value_states))]
        return torch.stack([keys for keys, _ in read]), torch.stack([values for _, values in read])

    def get_seq_length(self) -> int:
        return self.rows[0].length if self.rows else 0

    def crop(self, tokens_to_remove: int) -> None:
        length = max(0, self.get_seq_length() + tokens_to_remove)
        for row in self.rows:
            row.crop(length)
        if length == 0:
            self.rows = []

    def select(self, indices) -> None:
        self.rows = [self.rows[int(i)].copy() for i in indices] if self.rows else []

    def reorder_cache(self, beam_idx) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([i for i in range(len(self.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        self.rows = []


class TwinCache(Cache):
    """DynamicCache with a twin layer wherever attention is neither sliding nor linear."""

    def __init__(self, config, settings: CacheSettings, padding: list[int] | None = None):
        layers = DynamicCache(config=config).layers
        dense = [layer % len(layers) for layer in settings.dense_layers]
        super().__init__(
            layers=[
                TwinLayer(settings, i, padding) if type(layer) is DynamicLayer and i not in dense else layer
                for i, layer in enumerate(layers)
            ]
        )
