"""The encoding kernel against `VectorQuantizer.encode`, its twin in float64.

Axis letters: B batch, G key/value heads, T tokens, D head dim.
"""

from dataclasses import dataclass

import pytest
import torch
from kernel_cases import DEVICE, rms_ratio

from msa_hf.kernels.encode import Coding, encode, matrix_parts, serves_encoding, stretch_table
from msa_hf.modeling import turboquant
from msa_hf.modeling.codebooks import codebook
from msa_hf.modeling.turboquant import PackedVectors, Transform, VectorQuantizer, scale_table

# A number that lies within float32 rounding of a boundary may get either code. One in 10,000 does where
# nearest centroids are taken; where a search finds two stretches equally good, a whole vector follows.
BYTES_THAT_DIFFER = 0.002
SCALES_THAT_DIFFER = 0.01
DECODED_ERROR = 0.01  # RMS ratio, of those few codes: one step of one coordinate in 10,000
ROOM, GARBAGE = 7, 0xA5  # tokens of the buffers around those that are written


def limits() -> torch.Tensor:
    table = scale_table()
    return (table[1:] * table[:-1]).sqrt().float().to(DEVICE)


@dataclass
class Written:
    """Buffers of garbage and a kind of states that is coded into them, from token `position` on."""

    states: torch.Tensor
    quantizer: VectorQuantizer
    transform: Transform
    position: int = 0
    gains: torch.Tensor | None = None
    heads: list[int] | None = None

    def __post_init__(self):
        batch, heads, tokens, _ = self.states.shape
        shape = (batch, len(self.heads or range(heads)), self.position + tokens + ROOM)
        codes = torch.full((*shape, self.quantizer.code_bytes), GARBAGE, dtype=torch.uint8, device=DEVICE)
        scales = torch.full(
            (*shape, self.quantizer.scale_bits // 8), GARBAGE, dtype=torch.uint8, device=DEVICE
        )
        self.packed = PackedVectors(codes, scales.view(self.quantizer.scale_dtype), self.quantizer)

    def coding(self, tokens: slice = slice(None)) -> Coding:
        width, bits = self.quantizer.parts[0]
        matrix, factor = matrix_parts(self.transform.encode, bits, self.states.dtype)
        return Coding(
            self.states[:, :, tokens],
            matrix.to(DEVICE),
            factor,
            codebook(width, bits).to(DEVICE),
            self.packed.codes,
            self.packed.scales,
            self.quantizer.scale_rule,
            self.quantizer.code_search,
            self.gains,
            None if self.heads is None else torch.tensor(self.heads, dtype=torch.int32, device=DEVICE),
        )

    def twin(self, means: torch.Tensor | None = None, mean_group: int = 1) -> PackedVectors:
        vectors = self.states.double()
        if means is not None:
            group = torch.arange(self.position, self.position + vectors.shape[2], device=DEVICE) // mean_group
            vectors = vectors - means.double()[:, :, group]
        if self.heads is not None:
            vectors = vectors[:, self.heads]
        if self.gains is not None:
            vectors = vectors / self.gains[:, :, None, None]
        return self.quantizer.encode(vectors @ self.transform.to(DEVICE).encode)

    @property
    def result(self) -> PackedVectors:
        return self.packed[:, :, self.position : self.position + self.states.shape[2]]

    def untouched(self) -> bool:
        """Whether what lies around the tokens is garbage still."""
        end = self.position + self.states.shape[2]
        return all(
            (stored.view(torch.uint8)[:, :, part] == GARBAGE).all()
            for stored in (self.packed.codes, self.packed.scales)
            for part in (slice(0, self.position), slice(end, None))
        )

    def check(self, twin: PackedVectors) -> None:
        ours = self.result
        assert self.untouched()
        assert (ours.codes != twin.codes).double().mean() <= BYTES_THAT_DIFFER
        assert (ours.scales != twin.scales).double().mean() <= SCALES_THAT_DIFFER
        assert rms_ratio(ours.decode(), twin.decode()) <= DECODED_ERROR


def states(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def quantizer(dim: int, bits: int, rule: str = "least_squares", scale_bits: int = 8, search: int = 1):
    return VectorQuantizer(((dim, bits),), rule, scale_bits, search)


CASES = [
    # D, key bits, rule, scale bits, search, value bits, rule, scale bits, search, rotation, tokens
    (64, (4, "unbiased", 8, 9), (4, "unbiased", 8, 9), "hadamard", 65),
    (64, (1, "matched_norm", 8, 1), (2, "least_squares", 16, 9), "haar", 63),
    (64, (3, "least_squares", 16, 1), (1, "unbiased", 8, 9), "haar", 1),
    (96, (3, "matched_norm", 8, 9), (4, "unbiased", 16, 1), "hadamard", 63),
    (96, (2, "least_squares", 8, 1), (1, "matched_norm", 16, 1), "haar", 129),
    (128, (4, "unbiased", 8, 1), (3, "unbiased", 8, 1), "hadamard", 129),
    (128, (2, "matched_norm", 8, 9), (4, "least_squares", 8, 1), "haar", 63),
    (128, (3, "least_squares", 16, 9), (1, "unbiased", 8, 1), "hadamard", 1),
    (128, (4, "matched_norm", 16, 1), (2, "unbiased", 8, 1), "haar", 1000),
    (256, (4, "unbiased", 8, 9), (3, "matched_norm", 8, 1), "haar", 63),
    (256, (1, "least_squares", 16, 1), (2, "unbiased", 8, 1), "hadamard", 1),
    (80, (4, "unbiased", 8, 1), (3, "unbiased", 8, 1), "hadamard", 63),
    (112, (2, "unbiased", 8, 1), (1, "least_squares", 8, 1), "haar", 63),
    (192, (3, "unbiased", 8, 1), (4, "unbiased", 8, 1), "haar", 63),
]


@pytest.mark.parametrize(("dim", "key", "value", "rotation", "tokens"), CASES)
def test_codes_and_scales_are_those_of_the_twin(dim, key, value, rotation, tokens):
    batch, heads = (1, 1) if tokens == 1000 else (2, 2)
    position, mean_group = 70, 64
    means = 3 * states(batch, heads, (position + tokens) // mean_group + 1, dim, seed=1)
    # Heads beside tokens, as a projection gives them, and a buffer with more tokens than are coded.
    keys = states(batch, tokens + 3, heads, dim).transpose(1, 2)[:, :, :tokens] + 3
    values = states(batch, heads, tokens + 3, dim, seed=2)[:, :, 3:]
    transform = Transform.rotation(rotation, (dim,))
    gains = torch.tensor([0.5, 2.0]).repeat(batch, 1)[:, :heads].to(DEVICE)
    kinds = [
        Written(keys, quantizer(dim, *key), transform, position, gains),
        Written(values, quantizer(dim, *value), transform, position),
    ]
    encode([kind.coding() for kind in kinds], position, means, mean_group, limits())
    kinds[0].check(kinds[0].twin(means, mean_group))
    kinds[1].check(kinds[1].twin())


def test_codes_that_differ_lie_on_boundaries():
    kind = Written(states(1, 2, 400, 128), quantizer(128, 4), Transform.rotation("haar", (128,)))
    encode([kind.coding()], 0, level_limits=limits())
    ours, twin = kind.result, kind.twin()
    vectors = kind.states.double() @ kind.transform.to(DEVICE).encode
    spread = vectors * (128**0.5 / vectors.norm(dim=-1, keepdim=True))
    boundaries = turboquant.boundaries(128, 4).to(DEVICE)
    distance = (spread[..., None] - boundaries).abs().amin(dim=-1)
    unpacked = [turboquant.unpack(packed.codes, 4, 128) for packed in (ours, twin)]
    assert distance[unpacked[0] != unpacked[1]].lt(1e-4).all()


def test_heads_with_matrices_of_their_own_are_chosen():
    transform = Transform(torch.stack([Transform.rotation("haar", (64,), seed).encode for seed in range(2)]))
    gains = torch.tensor([[4.0, 0.25], [1.0, 2.0]], device=DEVICE)
    kind = Written(states(2, 4, 20, 64), quantizer(64, 3), transform, 5, gains, [3, 1])
    other = Written(states(2, 4, 20, 64, seed=1), quantizer(64, 2), Transform.rotation("haar", (64,)), 5)
    means = states(2, 4, 2, 64, seed=2)
    encode([kind.coding(), other.coding()], 5, means, 16, limits())
    kind.check(kind.twin(means, 16))
    other.check(other.twin())


@pytest.mark.parametrize("search", (1, 3))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_vector_is_coded_alike_wherever_it_stands(dtype, search):
    whole, pieces = (
        Written(
            states(1, 2, 140, 64, dtype=dtype),
            quantizer(64, 3, "unbiased", search=search),
            Transform.rotation("haar", (64,)),
            position=12,
        )
        for _ in range(2)
    )
    means = states(1, 2, 3, 64, seed=1)
    encode([whole.coding()], 12, means, 64, limits())
    start = 0
    for length in (1, 64, 3, 72):
        encode([pieces.coding(slice(start, start + length))], 12 + start, means, 64, limits())
        start += length
    assert torch.equal(whole.packed.codes, pieces.packed.codes)
    assert torch.equal(whole.packed.scales, pieces.packed.scales)
    whole.check(whole.twin(means, 64))


@pytest.mark.parametrize("scale_bits", (8, 16))
def test_vectors_without_a_direction_have_no_length(scale_bits):
    keys = states(1, 1, 4, 64)
    keys[:, :, 1] = keys[:, :, 3]
    means = keys[:, :, 3:]
    key = Written(keys, quantizer(64, 4, "unbiased", scale_bits), Transform.rotation("haar", (64,)))
    value = Written(keys * 0, quantizer(64, 2, "unbiased", scale_bits), key.transform)
    encode([key.coding(), value.coding()], 0, means, 4, limits())
    lengths = key.result.decode().norm(dim=-1)
    assert (lengths[..., [1, 3]] == 0).all() and (lengths[..., [0, 2]] > 1).all()
    assert (value.result.scales == 0).all()


@pytest.mark.parametrize("scale_bits", (8, 16))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_every_finite_vector_is_coded(dtype, scale_bits):
    largest = torch.finfo(dtype).max
    kind = Written(
        torch.cat(
            [
                states(1, 1, 8, 64, dtype=dtype).sign() * largest,
                states(1, 1, 8, 64, dtype=torch.float32)
                .mul(1e-4 if dtype == torch.float16 else 1e-30)
                .to(dtype),
                torch.eye(64, device=DEVICE)[None, None, :8].to(dtype) * largest,
                torch.ones(1, 1, 1, 64, device=DEVICE, dtype=dtype),
            ],
            dim=2,
        ),
        quantizer(64, 4, "least_squares", scale_bits),
        Transform.rotation("hadamard", (64,)),
    )
    encode([kind.coding()], 0, level_limits=limits())
    assert kind.result.decode().isfinite().all()
    kind.check(kind.twin())


def test_numbers_on_the_boundary_of_signs_get_the_code_of_the_twin():
    whole = torch.randint(-2, 3, (1, 1, 60, 128), device=DEVICE).bfloat16()
    kind = Written(whole, quantizer(128, 4), Transform.rotation("hadamard", (128,)))
    encode([kind.coding()], 0, level_limits=limits())
    assert torch.equal(kind.result.codes, kind.twin().codes)


def test_a_matrix_is_the_sum_of_its_parts():
    haar = Transform.rotation("haar", (128,)).encode
    for matrix in (haar, 1e3 * haar, torch.stack([haar, haar.T / 7])):
        for dtype, error in (
            (torch.bfloat16, 2.0**-17),
            (torch.float16, 2.0**-22),
            (torch.float32, 2.0**-24),
        ):
            parts, factor = matrix_parts(matrix, 4, dtype)
            assert (parts.double().sum(0) * factor - matrix).abs().max() <= error * matrix.abs().max()
    parts, factor = matrix_parts(Transform.rotation("hadamard", (128,)).encode, 4, torch.bfloat16)
    assert parts.shape[0] == 1 and len(parts.abs().unique()) == 1


def test_stretches_are_those_of_the_twin():
    for count in (1, 2, 9, 16):
        table = stretch_table(count, torch.device("cpu"))
        assert table.tolist() == list(turboquant._stretches(count))


def test_compiles_without_a_break():
    kind, again = (
        Written(states(1, 2, 9, 64), quantizer(64, 4), Transform.rotation("hadamard", (64,)))
        for _ in range(2)
    )
    encode([kind.coding()], 0, level_limits=limits())
    coding, level_limits = again.coding(), limits()
    torch.compile(lambda: encode([coding], 0, None, 0, level_limits), fullgraph=True, backend="eager")()
    assert torch.equal(kind.packed.codes, again.packed.codes)
    assert torch.equal(kind.packed.scales, again.packed.scales)


def test_what_cannot_be_coded_is_refused():
    kind = Written(states(1, 1, 4, 64), quantizer(64, 4), Transform.rotation("hadamard", (64,)))
    coding = kind.coding()
    means = states(1, 1, 1, 64)
    for wrong, message in (
        ({"position": ROOM + 1}, "room"),
        ({"position": 2, "means": means, "mean_group": 5}, "means"),
        ({"position": 0, "level_limits": None}, "level_limits"),
    ):
        with pytest.raises(ValueError, match=message):
            encode([coding], **{"level_limits": limits(), **wrong})
    with pytest.raises(ValueError, match="1 to 4 bits"):
        encode([coding._replace(codes=coding.codes[..., :7])], 0, level_limits=limits())
    with pytest.raises(ValueError, match="matrix_parts"):
        encode([coding._replace(states=kind.states.half())], 0, level_limits=limits())
    assert kind.untouched() and (kind.result.codes == GARBAGE).all()
    assert serves_encoding(64, 4, kind.states)
    assert not serves_encoding(64, 5, kind.states)
    assert not serves_encoding(32, 4, kind.states)
    assert not serves_encoding(64, 4, kind.states.double())
