"""The quantiser against closed forms, quadrature and naive twins: codebooks, rotations, codes, bytes."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling import rotations
from msa_hf.modeling.bit_packing import packed_bytes, unpack
from msa_hf.modeling.codebooks import boundaries, codebook, distortion
from msa_hf.modeling.rotations import haar, signed_hadamard, walsh_hadamard
from msa_hf.modeling.turboquant import (
    SCALE_RULES,
    PackedVectors,
    Transform,
    VectorQuantizer,
    dequantize,
    quantize,
    read_scale,
    scale_table,
)

BITS, SPEC_BITS = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4)
DIMS = (2, 16, 64, 80, 96, 112, 128, 192, 256, 576)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)
PARTS = [((64, 4),), ((16, 3), (48, 2)), ((18, 1), (6, 4), (40, 3))]

# specs/turboquant.md, section 1: positive centroids times sqrt(d) at d = 128; E||u - u~||^2 at d = 64, 128.
SPEC_CENTROIDS = {
    1: [0.7979],
    2: [0.4525, 1.5053],
    3: [0.2446, 0.7536, 1.3370, 2.1318],
    4: [0.1281, 0.3870, 0.6546, 0.9382, 1.2490, 1.6055, 2.0470, 2.6898],
}
SPEC_DISTORTION = {64: [0.35839, 0.11453, 0.03339, 0.00913], 128: [0.36089, 0.11600, 0.03397, 0.00931]}
SPEC_PRODUCT_ERROR = [0.571, 0.133, 0.0358, 0.0096]  # times d, unbiased scale


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrals(dim, low, high):
    """(probability, mean of t, mean of t^2) over low < t < high, unnormalised, by Gauss-Legendre quadrature.

    t is a coordinate of sqrt(dim) * a random unit vector; t = sqrt(dim) * sin(a) makes its density smooth.
    """
    ends = np.arcsin(np.clip(np.array([low, high]) / dim**0.5, -1, 1))
    angle = ends.mean() + NODES * np.diff(ends)[0] / 2
    mass = WEIGHTS * np.cos(angle) ** (dim - 2) * np.diff(ends)[0] / 2
    t = np.sin(angle) * dim**0.5
    return mass.sum(), (mass * t).sum(), (mass * t * t).sum()


def cells(dim, table):
    edges = [-(dim**0.5), *(table[1:] + table[:-1]) / 2, dim**0.5]
    return [integrals(dim, low, high) for low, high in zip(edges, edges[1:])]


def solved_codebook(table, dim):
    """Centroids that are the means of their cells, by Newton's method: they are unique, the density is
    log-concave (Fleischer 1964), so that the start does not matter."""

    def excess(table):
        return np.array([first / mass for mass, first, _ in cells(dim, table)]) - table

    for _ in range(2):
        steps = 1e-6 * np.eye(len(table))
        slopes = [(excess(table + step) - excess(table - step)) / 2e-6 for step in steps]
        table = table - np.linalg.solve(np.array(slopes).T, excess(table))
    assert np.abs(excess(table)).max() < 1e-11
    return table


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_codebook_is_the_fixed_point_of_lloyd_and_max(dim, bits):
    table = codebook(dim, bits).double()
    assert table.shape == (2**bits,) and codebook(dim, bits).dtype == torch.float32
    assert torch.equal(table, -table.flip(0)) and (table.diff() > 0).all() and table.abs().max() < dim**0.5
    torch.testing.assert_close(boundaries(dim, bits), (table[1:] + table[:-1]) / 2, rtol=0, atol=0)
    np.testing.assert_allclose(table, solved_codebook(table.numpy(), dim), atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_distortion_equals_quadrature(dim, bits):
    table, total, error = codebook(dim, bits).double().numpy(), 0.0, 0.0
    for c, (mass, first, second) in zip(table, cells(dim, table)):
        total += mass
        error += second - 2 * c * first + c * c * mass
    assert distortion(dim, bits) == pytest.approx(error / total, rel=1e-5)
    assert distortion(dim, bits) < 2.7207 * 4**-bits


@pytest.mark.parametrize("bits", SPEC_BITS)
def test_codebook_and_distortion_of_the_specification(bits):
    """On the unit sphere, where centroids are divided by sqrt(d), the printed ones are up to 1.1e-4 off those
    of the quadrature above; the one of 1 bit is that of the normal distribution."""
    positive = codebook(1 << 16 if bits == 1 else 128, bits)[2 ** (bits - 1) :]
    expected = torch.tensor(SPEC_CENTROIDS[bits])
    torch.testing.assert_close(positive / 128**0.5, expected / 128**0.5, atol=1.1e-4, rtol=0)
    for dim, values in SPEC_DISTORTION.items():
        assert distortion(dim, bits) == pytest.approx(values[bits - 1], rel=0.01)


@pytest.mark.parametrize("dim", DIMS)
def test_one_bit_in_closed_form(dim):
    mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) * (dim / math.pi) ** 0.5
    assert codebook(dim, 1)[1].item() == pytest.approx(mean, rel=1e-6)
    assert distortion(dim, 1) == pytest.approx(1 - mean**2, rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_three_dimensions_have_uniform_coordinates(bits):
    """Archimedes: the best quantiser is the even one, and its distortion is the lower bound 4^-b itself."""
    even = (torch.arange(2**bits) + 0.5) * 2 / 2**bits - 1
    torch.testing.assert_close(codebook(3, bits), even * 3**0.5, atol=1e-5, rtol=0)
    assert distortion(3, bits) == pytest.approx(4**-bits, rel=1e-5)


@pytest.mark.parametrize("dim, bits", [(64, 0), (64, 7), (1, 4), (0, 2)])
def test_codebooks_that_do_not_exist(dim, bits):
    with pytest.raises(ValueError, match="got"):
        codebook(dim, bits)


def assert_orthogonal(matrix, dim):
    assert matrix.dtype == torch.float64 and matrix.shape == (dim, dim)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(half=st.integers(1, 150), seed=st.integers(0, 2**40))
def test_hadamard_rotations_are_orthogonal_and_flat(half, seed):
    dim = 2 * half
    rotation = signed_hadamard(dim, seed)
    assert_orthogonal(rotation, dim)
    # A vector of one coordinate: the longest of the new ones, where it would be 1 without a rotation.
    largest = rotation.abs().amax(dim=1) * dim**0.5
    if dim & (dim - 1) == 0:
        torch.testing.assert_close(largest, torch.ones_like(largest))
    assert largest.max() < 8


@pytest.mark.parametrize("make", [signed_hadamard, haar])
@pytest.mark.parametrize("dim", [80, 96, 112, 192, 256, 576])
def test_rotations_of_common_head_dims(make, dim):
    assert_orthogonal(make(dim, 1), dim)


@pytest.mark.parametrize("make", [signed_hadamard, haar])
def test_a_seed_names_one_rotation(make):
    first = make(48, 7).clone()
    make.cache_clear()
    assert torch.equal(make(48, 7), first)
    assert not torch.equal(make(48, 8), first) and torch.equal(make(48), make(48, 0))


def test_rotations_do_not_touch_the_generator_of_torch():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rotations.signed_hadamard.__wrapped__(64, 3), rotations.haar.__wrapped__(16, 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dim", [1, 3, 63, 0, -2])
def test_odd_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match=f"even and positive; got {dim}"):
        signed_hadamard(dim)


def test_walsh_hadamard_by_hand():
    expected = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(walsh_hadamard(4).float(), expected)


def test_haar_signs_are_those_of_the_haar_measure():
    """Under Haar measure E[trace] = 0 and E[trace^2] = 1; without the signs of R the mean is below 0."""
    traces = torch.stack([haar.__wrapped__(6, seed).trace() for seed in range(600)])
    assert abs(traces.mean()) < 4 / 600**0.5
    assert traces.square().mean() == pytest.approx(1, abs=4 * (2 / 600) ** 0.5)


@pytest.mark.parametrize("kind", ["hadamard", "haar", "none"])
def test_transform_rotates_each_part_on_its_own(kind):
    transform = Transform.rotation(kind, (16, 48), seed=3)
    assert_orthogonal(transform.encode.double(), 64)
    assert not transform.encode[:16, 16:].any() and not transform.encode[16:, :16].any()
    assert transform.nbytes == 64 * 64 * (8 + 4)
    if kind == "none":
        assert torch.equal(transform.encode, torch.eye(64, dtype=torch.float64))


def test_transform_of_unknown_kind():
    with pytest.raises(ValueError, match="rotation must be one of hadamard, haar, none; got 'fft'"):
        Transform.rotation("fft", (8,))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256, 576])
def test_measured_distortion_of_random_directions(dim, bits):
    """Codes read at their nominal scale lose what the codebook says; the best scale saves O(1 / d) of it."""
    count = 600_000 // dim
    vectors, expected = normal(count, dim, seed=7), distortion(dim, bits)
    packed = VectorQuantizer(((dim, bits),)).encode(vectors)
    index = unpack(packed.codes, bits, dim)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    nearest = (units[:50, :, None] * dim**0.5 - codebook(dim, bits)).abs().argmin(dim=-1)
    assert torch.equal(index[:50].long(), nearest)
    losses = (units - codebook(dim, bits)[index.int()].double() / dim**0.5).square().sum(dim=-1)
    assert losses.mean() == pytest.approx(expected, rel=0.01)
    assert losses.mean() == pytest.approx(expected, abs=4 * (losses.std() / count**0.5).item())
    best = (vectors - packed.decode(torch.float64)).square().sum(dim=-1) / vectors.square().sum(dim=-1)
    rounding = 2**-18  # of the scale, squared
    assert expected * (1 - 3 / dim - 0.01) < best.mean() < losses.mean() + rounding


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("bits", SPEC_BITS)
def test_cosine_exposes_a_worse_codebook(bits, rule):
    """cos(x, x~) = sqrt(1 - D) whatever the scale: .939, .983 and .995 at 2, 3 and 4 bits."""
    vectors = normal(2000, 128, seed=bits)
    transform = Transform.rotation("hadamard", (128,))
    packed = quantize(vectors, VectorQuantizer(((128, bits),), rule), transform)
    cosine = torch.cosine_similarity(vectors, dequantize(packed, transform).double(), dim=-1).mean()
    assert cosine == pytest.approx((1 - SPEC_DISTORTION[128][bits - 1]) ** 0.5, abs=1e-3)
    if bits > 1:
        assert cosine == pytest.approx({2: 0.939, 3: 0.983, 4: 0.995}[bits], abs=2e-3)


@pytest.mark.parametrize("bits", SPEC_BITS)
@pytest.mark.parametrize("dim", [64, 128, 576])
def test_unbiased_scale(dim, bits):
    """<q, x~> - <q, x> has mean 0, also for queries along x, and variance D / (1 - D) / d."""
    vectors = torch.nn.functional.normalize(normal(1200, dim, seed=1), dim=-1)
    queries = torch.nn.functional.normalize(normal(400, dim, seed=2), dim=-1)
    packed = VectorQuantizer(((dim, bits),), "unbiased").encode(vectors)
    error = packed.decode(torch.float64) - vectors
    products = queries @ error.mT
    for sample in (products.mean(dim=0), ((queries[0] + vectors) * error).sum(dim=-1)):
        assert abs(sample.mean()) < 3 * sample.std() / len(sample) ** 0.5
    expected = distortion(dim, bits) / (1 - distortion(dim, bits))
    assert products.square().mean() * dim == pytest.approx(expected, rel=0.02 + 2.5 / dim)
    assert products.square().mean() * dim == pytest.approx(SPEC_PRODUCT_ERROR[bits - 1], rel=0.02 + 4 / dim)
    # Scales are rounded to 8 bits of mantissa; but for that <x, x~> = <x, x>.
    assert (error * vectors).sum(dim=-1).abs().max() < 2**-8


@pytest.mark.parametrize("parts", PARTS)
def test_least_squares_is_nearest_and_matched_norm_keeps_length(parts):
    vectors = normal(300, 64) * torch.logspace(-3, 3, 300, dtype=torch.float64)[:, None]
    decoded = {rule: VectorQuantizer(parts, rule).encode(vectors) for rule in SCALE_RULES}
    assert all(torch.equal(packed.codes, decoded["unbiased"].codes) for packed in decoded.values())
    start, rounding = 0, 2**-8
    for width, _ in parts:
        own = vectors[:, start : start + width]
        read = {
            rule: packed.decode(torch.float64)[:, start : start + width] for rule, packed in decoded.items()
        }
        loss = {rule: (own - part).norm(dim=-1) for rule, part in read.items()}
        length = own.norm(dim=-1)
        for rule in ("unbiased", "matched_norm"):
            assert (
                loss["least_squares"] <= (loss[rule].square() + (rounding * length).square()).sqrt()
            ).all()
            assert (loss["least_squares"] / length).sum() < (loss[rule] / length).sum()
        torch.testing.assert_close(read["matched_norm"].norm(dim=-1), length, rtol=rounding, atol=0)
        torch.testing.assert_close((read["unbiased"] * own).sum(-1), length.square(), rtol=rounding, atol=0)
        start += width


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_bytes_are_counted_from_the_tensors(parts, scale_bits):
    quantizer = VectorQuantizer(parts, scale_bits=scale_bits)
    packed = quantizer.encode(normal(5, 2, 64))
    assert packed.codes.shape[-1] == quantizer.code_bytes == sum(packed_bytes(w, b) for w, b in parts)
    assert packed.scales.shape[-1] == quantizer.scale_count == len(parts)
    assert packed.scales.dtype == quantizer.scale_dtype
    assert packed.nbytes == 10 * quantizer.vector_bytes and packed.shape == (5, 2, 64)
    assert quantizer.bits_per_element == 8 * packed.nbytes / packed.shape.numel()
    # A part of its own is coded as if it were the whole vector.
    start, codes, scales = 0, [], []
    for width, bits in parts:
        own = normal(5, 2, 64)[..., start : start + width]
        alone = VectorQuantizer(((width, bits),), scale_bits=scale_bits).encode(own)
        codes.append(alone.codes)
        scales.append(alone.scales)
        start += width
    assert torch.equal(packed.codes, torch.cat(codes, -1)) and torch.equal(
        packed.scales, torch.cat(scales, -1)
    )


def test_bytes_of_the_specification():
    """Section 3: 132, 100 and 68 bytes for a key and a value of 128; the paper's 2.5 and 3.5 bits."""
    for bits, expected in ((4, 132), (3, 100), (2, 68)):
        assert 2 * VectorQuantizer(((128, bits),)).vector_bytes == expected
    assert VectorQuantizer(((32, 3), (96, 2))).bits_per_element == 2.5
    assert VectorQuantizer(((32, 4), (96, 3))).bits_per_element == 3.5


def test_eight_bit_scales():
    """A step of 2^(1/32) around 1: at most half a step off; 0 means a zero vector and nothing else does."""
    lengths = torch.logspace(-0.3, 0.3, 400, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(normal(400, 64), dim=-1) * 8 * lengths[:, None]
    coarse, fine = (VectorQuantizer(((64, 4),), scale_bits=bits).encode(vectors) for bits in (8, 16))
    assert torch.equal(coarse.codes, fine.codes)
    ratio = read_scale(coarse.scales, torch.float64) / read_scale(fine.scales, torch.float64)
    assert ratio.log2().abs().max() < 1.2 / 64 + 2**-8
    assert (scale_table().diff() > 0).all() and scale_table().shape == (256,) and scale_table()[0] == 0
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(read_scale(levels, torch.float64), scale_table().float().double())
    tiny = VectorQuantizer(((4, 2),), scale_bits=8).encode(torch.tensor([[0.0] * 4, [1e-40] * 4]))
    assert tiny.scales[0] == 0 and tiny.scales[1] == 1


EXTREMES = [0.0, 1e-45, 1e-40, 1e-30, 1.0, 6e4, 1e30, 1e38, torch.finfo(torch.float32).max]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("parts", PARTS)
def test_finite_for_every_finite_input(parts, rule, scale_bits):
    quantizer = VectorQuantizer(parts, rule, scale_bits)
    transform = Transform.rotation("hadamard", tuple(width for width, _ in parts))
    shapes = torch.cat([torch.eye(64)[:3], torch.ones(1, 64), normal(4, 64).float().sign()])
    for size in EXTREMES:
        for vectors in (size * shapes, size * shapes.double(), (size * shapes).bfloat16()):
            if not vectors.isfinite().all():
                continue
            packed = quantize(vectors, quantizer, transform)
            assert packed.scales.isfinite().all() and dequantize(packed, transform).isfinite().all()
            if size == 0:
                assert not dequantize(packed, transform).any()
    mixed = torch.tensor([1e38, 1e-40] * 32)
    assert dequantize(quantize(mixed, quantizer, transform), transform).isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 6e4, 1e30])
def test_size_does_not_change_codes(size):
    quantizer, transform = VectorQuantizer(((64, 4),)), Transform.rotation("hadamard", (64,))
    vectors = normal(50, 64)
    small, large = (quantize(v, quantizer, transform) for v in (vectors, vectors * size))
    assert torch.equal(small.codes, large.codes)
    torch.testing.assert_close(
        dequantize(large, transform) / size, dequantize(small, transform), rtol=0.02, atol=1e-3
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    vectors = torch.ones(3, 64)
    vectors[1, 5] = bad
    with pytest.raises(ValueError, match="only finite vectors"):
        quantize(vectors, VectorQuantizer(((64, 4),)), Transform.rotation("none", (64,)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"parts": ((64, 7),)}, "bits must be 1 to 6; got 7"),
        ({"parts": ((64, 0),)}, "bits must be 1 to 6; got 0"),
        ({"parts": ((63, 4), (1, 2))}, "width of a part must be at least 2; got 1"),
        ({"parts": ((64, 4),), "scale_rule": "max"}, "scale_rule must be one of .*; got 'max'"),
        ({"parts": ((64, 4),), "scale_bits": 4}, "scale_bits must be 8 or 16; got 4"),
    ],
)
def test_bad_quantizers_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**fields)


@settings(max_examples=40, deadline=None)
@given(
    index=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    parts=st.sampled_from(PARTS),
    rule=st.sampled_from(SCALE_RULES),
    scale_bits=st.sampled_from([8, 16]),
    shape=st.sampled_from([(12,), (12, 1), (12, 3), (12, 2, 5)]),
    seed=st.integers(0, 9),
)
def test_selecting_codes_equals_coding_the_selection(index, parts, rule, scale_bits, shape, seed):
    vectors = normal(*shape, 64, seed=seed).bfloat16()
    quantizer, transform = VectorQuantizer(parts, rule, scale_bits), Transform.rotation("hadamard", (64,))
    packed, index = quantize(vectors, quantizer, transform), torch.tensor(index)
    for selected, chosen in (
        (packed[index], vectors[index]),
        (packed[3:9], vectors[3:9]),
        (packed[index[0]], vectors[index[0]]),
        (packed.map(lambda t: t.repeat_interleave(2, dim=0)), vectors.repeat_interleave(2, dim=0)),
        (packed.map(lambda t: t.flip(0)), vectors.flip(0)),
    ):
        again = quantize(chosen, quantizer, transform)
        assert torch.equal(selected.codes, again.codes) and torch.equal(selected.scales, again.scales)
        assert selected.shape == chosen.shape and torch.equal(selected.decode(), again.decode())


@pytest.mark.parametrize("dim", [96, 112, 128, 192])
def test_batch_shape_decides_no_code_where_sums_cancel(dim):
    """Few-bit numbers make coordinates that are exactly 0, on a boundary: no order of sums may move them."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-3, 4, (1500, dim), generator=generator).double()
    quantizer, transform = VectorQuantizer(((dim, 4),)), Transform.rotation("hadamard", (dim,))
    packed = quantize(vectors, quantizer, transform)
    exact = vectors.view(-1, 1, dim) @ transform.encode
    assert (exact.abs() < 1e-12).any(), "the case must be among the vectors"
    for rows in (1, 3, 17):
        pieces = [quantize(piece, quantizer, transform) for piece in vectors.split(rows)]
        assert torch.equal(torch.cat([piece.codes for piece in pieces]), packed.codes)
        assert torch.equal(torch.cat([piece.scales for piece in pieces]), packed.scales)
    shuffled = quantize(vectors.mT.contiguous().mT, quantizer, transform)
    assert torch.equal(shuffled.codes, packed.codes)


def test_map_acts_on_codes_and_scales():
    packed = VectorQuantizer(((8, 2),)).encode(normal(4, 3, 8))
    moved = packed.map(partial(torch.transpose, dim0=0, dim1=1))
    assert (
        isinstance(moved, PackedVectors) and moved.shape == (3, 4, 8) and moved.quantizer == packed.quantizer
    )
    assert torch.equal(moved.decode(), packed.decode().transpose(0, 1))


def test_any_invertible_transform():
    """Codes are those of x @ encode; reading undoes it, and scores are taken with the codes as they are."""
    matrix = torch.linalg.qr(normal(32, 32))[0] * torch.linspace(0.5, 2, 32, dtype=torch.float64)
    transform = Transform(matrix, torch.linalg.inv(matrix))
    vectors, queries = normal(40, 32, seed=1), normal(5, 32, seed=2).float()
    packed = quantize(vectors, VectorQuantizer(((32, 4),)), transform)
    identity = Transform.rotation("none", (32,))
    expected = dequantize(quantize(vectors @ matrix, VectorQuantizer(((32, 4),)), identity), identity)
    torch.testing.assert_close(
        dequantize(packed, transform),
        (expected.double() @ torch.linalg.inv(matrix)).float(),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (dequantize(packed, transform) - vectors).norm() < 0.15 * vectors.norm()
    scores = (queries @ transform.decode.mT) @ packed.decode().mT
    torch.testing.assert_close(scores, queries @ dequantize(packed, transform).mT, atol=1e-4, rtol=1e-4)


def test_transform_per_head():
    encode = torch.stack([haar(16, seed) for seed in range(3)])
    vectors, quantizer = normal(2, 3, 7, 16), VectorQuantizer(((16, 3),))
    packed, transform = quantize(vectors, quantizer, Transform(encode)), Transform(encode)
    for head in range(3):
        own = Transform(encode[head])
        alone = quantize(vectors[:, head], quantizer, own)
        assert torch.equal(packed.codes[:, head], alone.codes)
        assert torch.equal(packed.scales[:, head], alone.scales)
        torch.testing.assert_close(dequantize(packed, transform)[:, head], dequantize(alone, own))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_coded_as_its_own_values(dtype):
    quantizer, transform = VectorQuantizer(((64, 4),)), Transform.rotation("hadamard", (64,))
    vectors = normal(20, 64).to(dtype)
    packed, exact = (quantize(v, quantizer, transform) for v in (vectors, vectors.double()))
    assert torch.equal(packed.codes, exact.codes) and torch.equal(packed.scales, exact.scales)
    assert packed.decode(dtype).dtype == dtype


def test_constant_keys_are_randomised():
    """Without random signs a constant vector would be a single coordinate, which no 2 bit code can hold."""
    vectors = torch.cat([torch.ones(1, 128), torch.tensor([1.0, -1.0]).repeat(1, 64), torch.eye(128)[:1]])
    quantizer = VectorQuantizer(((128, 2),))
    for seed in range(5):
        transform = Transform.rotation("hadamard", (128,), seed)
        cosine = torch.cosine_similarity(
            vectors, dequantize(quantize(vectors, quantizer, transform), transform)
        )
        assert (cosine > 0.8).all()


def test_a_transform_goes_elsewhere_without_leaving():
    transform = Transform.rotation("hadamard", (8,))
    elsewhere = transform.to(torch.device("meta"))
    assert transform.encode.device.type == transform.decode.device.type == "cpu"
    assert elsewhere.encode.device.type == elsewhere.decode.device.type == "meta"
    assert transform.to(torch.device("meta")) is elsewhere
    assert transform.to(torch.device("cpu")) is transform


def test_a_copied_transform_is_the_same_one():
    transform = Transform.rotation("hadamard", (8,))
    assert copy.deepcopy({"read by": transform})["read by"] is transform
