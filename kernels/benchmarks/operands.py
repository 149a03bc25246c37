"""What the operators are compiled, verified and timed with: random packed layers and their arguments.

Axis letters: B batch, H query heads, G key/value heads, Q query tokens, P packed tokens, L recent tokens,
D head dim, C chunks, W = G * D, K places of a memory prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from msa_hf import kernels
from msa_hf.modeling.codebooks import codebook
from msa_hf.modeling.packed_states import ExactTokens, HeadCodes, LayerView
from msa_hf.modeling.turboquant import PackedVectors, Transform, VectorQuantizer, scale_table

Bits = int | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Attention:
    """One call of attention.

    Args:
        bits: (key bits, value bits) of all heads, or of each; a number for all channels, or (channels, bits)
            of each part.
        packed: P. recent: L, the query tokens included. mean_group: 0 for keys without means.
    """

    batch: int = 1
    heads: int = 32
    groups: int = 8
    queries: int = 1
    packed: int = 1024
    dim: int = 128
    bits: tuple[tuple[Bits, Bits], ...] = ((4, 4),)
    recent: int = 160
    exact: int = 8
    mean_group: int = 256
    scale_bits: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def head_bits(self) -> tuple[tuple[Bits, Bits], ...]:
        return self.bits * self.groups if len(self.bits) == 1 else self.bits

    def quantizer(self, bits: Bits) -> VectorQuantizer:
        parts = ((self.dim, bits),) if isinstance(bits, int) else bits
        return VectorQuantizer(parts, scale_bits=self.scale_bits)

    @property
    def average_bits(self) -> float:
        """Per number, scales included."""
        return 8 * self.code_bytes / (2 * self.batch * self.packed * self.groups * self.dim)

    @property
    def code_bytes(self) -> int:
        """Codes and scales of all packed tokens."""
        per_token = sum(self.quantizer(bits).vector_bytes for head in self.head_bits for bits in head)
        return self.batch * self.packed * per_token

    @property
    def product_flops(self) -> int:
        """Multiplications and additions of scores and sums."""
        return 4 * self.batch * self.heads * self.queries * (self.packed + self.recent) * self.dim

    def view(self, device: torch.device, seed: int = 0) -> LayerView:
        """A layer whose codes, scales and dense tokens are random."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        shape = (self.batch, self.groups)
        means = None
        if self.mean_group:
            means = normal(*shape, -(-self.packed // self.mean_group), self.dim).bfloat16()
        exact = None
        if self.exact:
            places = torch.arange(self.exact, dtype=torch.int32, device=device) * (self.packed // self.exact)
            exact = ExactTokens(
                normal(*shape, self.exact, self.dim).to(self.dtype),
                normal(*shape, self.exact, self.dim).to(self.dtype),
                places.expand(*shape, -1).contiguous(),
                torch.zeros(*shape, self.exact, device=device),
            )
        key_bits, value_bits = zip(*self.head_bits)
        return LayerView(
            key_codes=tuple(self._parts(key_bits, generator)),
            value_codes=tuple(self._parts(value_bits, generator)),
            means=means,
            mean_group=self.mean_group,
            exact=exact,
            keys=normal(*shape, self.recent, self.dim).to(self.dtype),
            values=normal(*shape, self.recent, self.dim).to(self.dtype),
            packed_length=self.packed,
        )

    def query(self, device: torch.device, seed: int = 0) -> torch.Tensor:
        """[B, H, Q, D]."""
        generator = torch.Generator(device).manual_seed(1000 + seed)
        shape = (self.batch, self.heads, self.queries, self.dim)
        return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

    def _parts(self, bits: tuple[Bits, ...], generator: torch.Generator) -> Iterator[HeadCodes]:
        """The heads of each coding, packed at random."""
        device = generator.device
        for coding in dict.fromkeys(bits):
            heads = [head for head, own in enumerate(bits) if own == coding]
            index = None if len(heads) == self.groups else torch.tensor(heads, device=device)
            yield self._codes(coding, len(heads), index, generator)

    def _codes(self, bits: Bits, heads: int, index: torch.Tensor | None, generator) -> HeadCodes:
        device, shape = generator.device, (self.batch, heads, self.packed)
        quantizer = self.quantizer(bits)
        codes = torch.randint(
            256, (*shape, quantizer.code_bytes), dtype=torch.uint8, generator=generator, device=device
        )
        gain = None
        if self.scale_bits == 8:  # levels of scales from 0.7 to 1.4
            scales = torch.randint(
                112,
                145,
                (*shape, quantizer.scale_count),
                dtype=torch.uint8,
                generator=generator,
                device=device,
            )
            gain = torch.ones(self.batch, heads, 1, 1, device=device)
        else:
            scales = torch.rand(*shape, quantizer.scale_count, generator=generator, device=device)
            scales = (0.7 + 0.7 * scales).bfloat16()
        transform = Transform.rotation("hadamard", (self.dim,))
        return HeadCodes(PackedVectors(codes, scales, quantizer), transform, index, None, gain)


def attention_calls(view: LayerView, query: torch.Tensor, out: torch.Tensor) -> list[dict[str, Any]]:
    """Arguments of the calls of `decode_attention` that write `out` [B, Q, H, D], one per pair of widths."""
    groups, device = view.keys.shape[1], query.device
    calls = []
    for keys in view.key_codes:
        for values in view.value_codes:
            key_heads, value_heads = (_places(part, groups) for part in (keys, values))
            shared = [[head, key_heads[head], value_heads[head]] for head in key_heads if head in value_heads]
            if shared:
                heads = torch.tensor(shared, dtype=torch.int32, device=device)
                calls.append(_attention_arguments(view, keys, values, heads, query, out))
    return calls


def _places(part: HeadCodes, groups: int) -> dict[int, int]:
    heads = range(groups) if part.heads is None else part.heads.tolist()
    return {head: place for place, head in enumerate(heads)}


def _attention_arguments(view, keys, values, heads, query, out) -> dict[str, Any]:
    arguments = {"out": out, "query": query, "heads": heads}
    for name, part in (("key", keys), ("value", values)):
        parts = part.packed.quantizer.parts
        arguments |= {
            f"{name}_codes": part.packed.codes,
            f"{name}_scales": part.packed.scales,
            f"{name}_centroids": [number for own in parts for number in codebook(*own).tolist()],
            f"{name}_parts": [number for own in parts for number in own],
            f"{name}_decode": part.transform.to(query.device).decode,
            f"{name}_gain": None if part.gain is None else part.gain[..., 0, 0],
        }
    exact = view.exact
    return arguments | {
        "levels": scale_table().float().to(query.device),
        "means": view.means,
        "mean_group": view.mean_group,
        "exact_keys": None if exact is None else exact.keys,
        "exact_values": None if exact is None else exact.values,
        "exact_positions": None if exact is None else exact.positions,
        "recent_keys": view.keys,
        "recent_values": view.values,
        "mask": None,
        "scaling": query.shape[-1] ** -0.5,
        "softcap": 0.0,
        "window": 0,
    }


@dataclass(frozen=True)
class Encoding:
    """One launch of `encode`: keys, with means, and values [B, G, T, D]."""

    batch: int = 1
    groups: int = 8
    tokens: int = 1024
    dim: int = 128
    bits: tuple[int, int] = (4, 4)
    search: int = 9
    mean_group: int = 256
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        vectors = self.batch * self.groups * self.tokens
        return vectors * sum(2 * self.dim + self.dim * bits // 8 + 1 for bits in self.bits)

    def states(self, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and means."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.groups, self.tokens, self.dim)
        keys, values = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        groups = -(-self.tokens // self.mean_group)
        means = torch.randn(*shape[:2], groups, self.dim, generator=generator, device=device)
        return keys.to(self.dtype), values.to(self.dtype), means.bfloat16()

    def quantizers(self) -> list[VectorQuantizer]:
        return [
            VectorQuantizer(((self.dim, bits),), scale_bits=8, code_search=self.search) for bits in self.bits
        ]

    def arguments(self, keys: torch.Tensor, values: torch.Tensor, means: torch.Tensor) -> dict[str, Any]:
        """Of `kernels.encode`; its codings hold the buffers that it writes."""
        turn = Transform.rotation("hadamard", (self.dim,)).encode.to(keys.device)
        table = scale_table()
        codings = []
        for states, quantizer in zip((keys, values), self.quantizers()):
            stored = states.shape[:3]
            matrix, factor = kernels.matrix_parts(turn, quantizer.parts[0][1], states.dtype)
            empty = {"dtype": torch.uint8, "device": states.device}
            codes = torch.empty(*stored, quantizer.code_bytes, **empty)
            scales = torch.empty(*stored, 1, **empty)
            centroids = codebook(*quantizer.parts[0]).to(states.device)
            codings.append(
                kernels.Coding(states, matrix, factor, centroids, codes, scales, search=self.search)
            )
        limits = (table[1:] * table[:-1]).sqrt().float().to(keys.device)
        return {
            "codings": codings,
            "position": 0,
            "means": means,
            "mean_group": self.mean_group,
            "level_limits": limits,
        }


@dataclass(frozen=True)
class Routing:
    """One call of `route_scores` with packed keys of `bits`, or with dense ones in bfloat16 for 0."""

    questions: int = 1
    tokens: int = 32
    chunks: int = 1024
    groups: int = 8
    dim: int = 128
    bits: int = 4

    @property
    def nbytes(self) -> int:
        """Bytes of the keys."""
        return self.chunks * self.groups * (self.dim * self.bits // 8 + 1 if self.bits else 2 * self.dim)

    @property
    def product_flops(self) -> int:
        return 2 * self.questions * self.tokens * self.chunks * self.groups * self.dim

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Of `route_scores`."""
        generator = torch.Generator(device).manual_seed(seed)
        width = self.groups * self.dim
        folded = torch.randn(self.questions, self.tokens, width, generator=generator, device=device)
        mask = torch.ones(self.questions, self.tokens, dtype=torch.bool, device=device)
        if not self.bits:
            keys = torch.randn(self.chunks, width, generator=generator, device=device, dtype=torch.bfloat16)
            return {"folded": folded.bfloat16(), "question_mask": mask, "keys": keys}
        shape = (self.chunks, self.groups)
        numbers = {"dtype": torch.uint8, "generator": generator, "device": device}
        return {
            "folded": folded,
            "question_mask": mask,
            "keys": torch.randint(256, (*shape, self.dim * self.bits // 8), **numbers),
            "scales": torch.randint(112, 145, (*shape, 1), **numbers),
            "centroids": codebook(self.dim, self.bits).tolist(),
            "levels": scale_table().float().to(device),
        }


@dataclass(frozen=True)
class Gathering:
    """One call of `gather_packed` with keys and values of `bits`, or of `gather_dense` for 0 (bfloat16).

    Args:
        samples: B. places: K, chunks that each of them reads.
    """

    samples: int = 8
    places: int = 1600
    chunks: int = 4096
    groups: int = 8
    dim: int = 128
    bits: int = 0

    @property
    def operator(self) -> str:
        return "gather_packed" if self.bits else "gather_dense"

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        vectors = 2 * self.samples * self.places * self.groups
        return vectors * (2 * self.dim + (self.dim * self.bits // 8 + 1 if self.bits else 2 * self.dim))

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Of the operator; the chunks of a sample lie in runs, as those of documents do."""
        generator = torch.Generator(device).manual_seed(seed)
        run = 32
        first = torch.randint(
            self.chunks - run, (self.samples, -(-self.places // run), 1), generator=generator, device=device
        )
        rows = (first + torch.arange(run, device=device)).flatten(1)[:, : self.places].contiguous()
        if not self.bits:
            shape = (self.chunks, self.groups * self.dim)
            options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
            keys, values = (torch.randn(shape, **options) for _ in range(2))
            return {"keys": keys, "values": values, "rows": rows, "heads": self.groups}
        arguments = {"levels": scale_table().float().to(device), "rows": rows, "dtype": torch.bfloat16}
        options = {"generator": generator, "device": device, "dtype": torch.uint8}
        for name in ("key", "value"):
            size = (self.chunks, self.groups, self.dim * self.bits // 8)
            arguments |= {
                f"{name}_codes": torch.randint(256, size, **options),
                f"{name}_scales": torch.randint(112, 145, (*size[:2], 1), **options),
                f"{name}_centroids": codebook(self.dim, self.bits).tolist(),
                f"{name}_decode": Transform.rotation("hadamard", (self.dim,)).to(device).decode,
                f"{name}_gain": None,
            }
        return arguments


@dataclass(frozen=True)
class Pooling:
    """One call of `pool_chunks` with keys, values and router keys of documents [B, T], the last one short."""

    documents: int = 16
    tokens: int = 4096
    groups: int = 8
    dim: int = 128
    chunk: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def lengths(self) -> list[int]:
        return [self.tokens] * (self.documents - 1) + [self.tokens // 2 + 1]

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        rows = sum(self.lengths) + sum(-(-length // self.chunk) for length in self.lengths)
        return 3 * rows * self.groups * self.dim * self.dtype.itemsize

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Of `pool_chunks`."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.documents, self.groups, self.tokens, self.dim)
        keys, values, router_keys = (
            torch.randn(shape, generator=generator, device=device).to(self.dtype).transpose(1, 2)
            for _ in range(3)
        )
        return {
            "states": [keys, values, router_keys.flatten(2)],
            "lengths": torch.tensor(self.lengths, device=device),
            "chunk_sizes": [self.chunk] * 3,
            "totals": [sum(-(-length // self.chunk) for length in self.lengths)] * 3,
        }


@dataclass(frozen=True)
class Ranking:
    """Chunk scores to the best documents: `document_maxima` or `document_means`, then `top_documents`."""

    questions: int = 1
    chunks: int = 1024
    documents: int = 64
    best: int = 16

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Of the first operator. Documents have very different lengths, some none."""
        generator = torch.Generator(device).manual_seed(seed)
        scores = torch.randn(self.questions, self.chunks, generator=generator, device=device)
        cuts = torch.randint(self.chunks + 1, (self.documents - 1,), generator=generator, device=device)
        ends = torch.tensor([0, self.chunks], device=device)
        return {"chunk_scores": scores, "offsets": torch.cat([ends[:1], cuts.sort().values, ends[1:]])}
