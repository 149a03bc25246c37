"""The papers' forms against closed forms: inner-product errors of "prod", angle codes of PolarQuant."""

import math

import numpy as np
import pytest
import torch
from backbones import tiny_backbone
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling.bit_packing import packed_bytes
from msa_hf.modeling.cache_turboquant import TurboQuantCache
from msa_hf.modeling.code_products import code_scores, code_sums
from msa_hf.modeling.codebooks import codebook, distortion
from msa_hf.modeling.rotations import haar
from msa_hf.modeling.turboquant import Transform, VectorQuantizer, dequantize, quantize
from msa_hf.modeling.turboquant_paper import (
    POLAR_BITS,
    PolarQuantizer,
    ProdQuantizer,
    angle_codebook,
    gaussian,
    polar_levels,
)

BITS = (1, 2, 3, 4)
PARTS = [((64, 4),), ((16, 3), (48, 2)), ((18, 1), (6, 4), (40, 3))]
FORMS = [ProdQuantizer, PolarQuantizer]
SPEC_PROD_ERROR = [1.571, 0.571, 0.1845, 0.0543]  # specs/turboquant.md, section 2, times d
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 128, 576])
def test_prod_reproduces_the_inner_product_error_of_the_paper(dim, bits):
    """E<q, x~ - x>^2 = E||r||^2 (pi / 2 - 1 / d) / d: S^T sign(S r) has d sqrt(2 / pi) along r / ||r||, and
    variance d in every other direction."""
    vectors, queries = units(4, 300, dim, seed=1), units(300, dim, seed=2)
    errors = torch.stack(
        [
            ProdQuantizer(((dim, bits),), seed).encode(own).decode(torch.float64) - own
            for seed, own in enumerate(vectors)
        ]
    )
    error = (queries @ errors.mT).square().mean().item() * dim
    residual = distortion(dim, bits - 1) if bits > 1 else 1.0
    assert error == pytest.approx(residual * (math.pi / 2 - 1 / dim), rel=0.04)
    assert error == pytest.approx(SPEC_PROD_ERROR[bits - 1], rel=0.04 + 2 / dim)


@pytest.mark.parametrize("bits", BITS)
def test_prod_is_unbiased_over_its_matrices(bits):
    """For one vector and the queries that would show a bias most: the vector itself and its residual."""
    vector = units(1, 32)
    coarse = codebook(32, bits - 1) if bits > 1 else torch.zeros(1)
    nearest = (vector[..., None] * 32**0.5 - coarse).abs().argmin(dim=-1)
    queries = torch.cat([vector, vector - coarse[nearest] / 32**0.5, units(1, 32, seed=9)])
    quantizers = [ProdQuantizer(((32, bits),), seed) for seed in range(300)]
    errors = torch.cat([q.encode(vector).decode(torch.float64) - vector for q in quantizers])
    for query in queries:
        products = errors @ query
        rounding = 2**-9 * query.norm()  # of the residual's length
        assert abs(products.mean()) < 3 * products.std() / 300**0.5 + rounding


@pytest.mark.parametrize("bits", BITS)
def test_prod_by_hand(bits):
    """Algorithm 2 of arXiv 2504.19874, word for word, but for scales in bfloat16."""
    vectors, width, sketch = 5 * normal(100, 24), 24, gaussian(24, 3)
    packed = ProdQuantizer(((width, bits),), 3).encode(vectors)
    for vector, decoded in zip(vectors, packed.decode(torch.float64)):
        read = torch.zeros(width, dtype=torch.float64)
        if bits > 1:
            table = codebook(width, bits - 1).double()
            nearest = (vector[:, None] * width**0.5 / vector.norm() - table).abs().argmin(dim=-1)
            read = table[nearest] * (vector.norm() / width**0.5).bfloat16().double()
        residual = vector - read
        signs = torch.where(sketch @ residual > 0, 1.0, -1.0).double()
        length = residual.norm().bfloat16().double()
        read = read + math.sqrt(math.pi / 2) / width * length * (sketch.mT @ signs)
        torch.testing.assert_close(decoded, read)
    assert packed.decode(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_prod_is_worse_than_as_many_bits_with_the_unbiased_scale(bits):
    """2.8 to 5.7 times, says the specification."""
    vectors = units(400, 128)
    prod = (ProdQuantizer(((128, bits),)).encode(vectors).decode(torch.float64) - vectors).square().sum()
    plain = VectorQuantizer(((128, bits),), "unbiased").encode(vectors).decode(torch.float64) - vectors
    assert 2.5 < prod / plain.square().sum() < 6.2


def test_gaussian_matrix_is_named_by_its_seed_and_is_no_rotation_in_disguise():
    first = gaussian(64, 5).clone()
    gaussian.cache_clear()
    assert torch.equal(gaussian(64, 5), first) and not torch.equal(gaussian(64, 6), first)
    assert abs(first.mean()) < 4 / 64 and first.var() == pytest.approx(1, abs=4 * 2**0.5 / 64)
    overlap = (torch.linalg.qr(first)[0] * haar(64, 5)).sum()
    assert abs(overlap) < 8, "the matrix of QJL is that of the rotation"


def angle_density(level):
    """(nodes, weights) of the density of a level's angle on [0, pi / 2] between `low` and `high`."""

    def integrate(low, high, function):
        angle = (low + high) / 2 + NODES * (high - low) / 2
        weight = WEIGHTS * np.sin(2 * angle) ** (2 ** (level - 1) - 1) * (high - low) / 2
        return (weight * function(angle)).sum()

    return integrate


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("level", range(2, 8))
def test_angle_codebooks_are_fixed_points_of_lloyd_and_max(level, bits):
    table = angle_codebook(level, bits).numpy()
    assert len(table) == 2**bits and (np.diff(table) > 0).all() and 0 < table[0] < table[-1] < math.pi / 2
    np.testing.assert_allclose(table + table[::-1], math.pi / 2, atol=1e-9)
    integrate, edges = angle_density(level), [0, *(table[1:] + table[:-1]) / 2, math.pi / 2]
    for centroid, low, high in zip(table, edges, edges[1:]):
        mean = integrate(low, high, lambda a: a) / integrate(low, high, np.ones_like)
        assert centroid == pytest.approx(mean, abs=2e-5)


def test_one_bit_of_the_second_level_in_closed_form():
    """Density sin(2 psi): the mean of the lower half is 1 / 2."""
    torch.testing.assert_close(
        angle_codebook(2, 1), torch.tensor([0.5, math.pi / 2 - 0.5], dtype=torch.float64), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("level", range(2, 8))
def test_angles_of_random_vectors_have_the_density(level):
    """Mean cos^2 and cos^4 of the angle between two radii of 2^(level - 1) normal numbers each."""
    left, right = normal(2, 20_000, 2 ** (level - 1), seed=level).norm(dim=-1)
    cosine = torch.cos(torch.atan2(right, left))
    integrate = angle_density(level)
    total = integrate(0, math.pi / 2, np.ones_like)
    for power in (2, 4):
        expected = integrate(0, math.pi / 2, lambda a, p=power: np.cos(a) ** p) / total
        sample = cosine**power
        assert sample.mean() == pytest.approx(expected, abs=4 * (sample.std() / 20_000**0.5).item())


def mean_cosine(width, bits):
    """E<u, u~> = product over the levels of E cos(psi - psi~), by quadrature."""
    first, higher, levels = polar_levels(width, bits)
    product = math.sin(math.pi / 2**first) / (math.pi / 2**first)
    for level in range(2, levels + 1):
        table, integrate = angle_codebook(level, higher).numpy(), angle_density(level)
        edges = [0, *(table[1:] + table[:-1]) / 2, math.pi / 2]
        cells = [
            (integrate(low, high, lambda a, c=c: np.cos(a - c)), integrate(low, high, np.ones_like))
            for c, low, high in zip(table, edges, edges[1:])
        ]
        product *= sum(cell for cell, _ in cells) / sum(mass for _, mass in cells)
    return product


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [2, 6, 16, 64, 80, 112, 128, 576])
def test_polar_distortion_is_that_of_independent_angles(dim, bits):
    """||u - u~||^2 = 2 - 2 <u, u~>, as radii are kept; angles of a normal vector are independent."""
    vectors = normal(400_000 // dim, dim, seed=3)
    error = (PolarQuantizer(((dim, bits),)).encode(vectors).decode(torch.float64) - vectors).square()
    measured = (error.sum() / vectors.square().sum()).item()
    assert measured == pytest.approx(2 - 2 * mean_cosine(dim, bits), rel=0.02)


def naive_polar(vector, bits):
    """One vector [D] coded and read with trigonometry in Python, level by level."""
    first, higher, levels = polar_levels(len(vector), bits)
    radii, kept = vector, []
    for level in range(1, levels + 1):
        pairs = list(zip(radii[0::2], radii[1::2]))
        radii = [math.hypot(*pair) for pair in pairs]
        angles = [math.atan2(y, x) % (2 * math.pi) for x, y in pairs]
        if level == 1:
            table = [(i + 0.5) * 2 * math.pi / 2**first for i in range(2**first)]
        else:
            table = angle_codebook(level, higher).tolist()
        kept.append([min(table, key=lambda c, a=a: abs(c - a)) for a in angles])
    radii = torch.tensor(radii, dtype=torch.float64).bfloat16().tolist()
    for angles in reversed(kept):
        radii = [part for r, a in zip(radii, angles) for part in (r * math.cos(a), r * math.sin(a))]
    return radii


@settings(max_examples=60, deadline=None)
@given(half=st.integers(1, 70), bits=st.sampled_from(BITS), seed=st.integers(0, 999))
def test_polar_equals_the_naive_twin(half, bits, seed):
    vector = normal(2 * half, seed=seed) * 10
    decoded = PolarQuantizer(((2 * half, bits),)).encode(vector).decode(torch.float64)
    torch.testing.assert_close(decoded.tolist(), naive_polar(vector.tolist(), bits), atol=1e-9, rtol=1e-9)


def test_polar_bits_of_the_paper():
    """Section 4 of arXiv 2502.02617: 16 coordinates take 8 angles of 4 bits, 7 of 2 and a radius: 62 bits."""
    assert POLAR_BITS[4] == (4, 2, 4)
    assert PolarQuantizer(((128, 4),)).bits_per_element == 62 / 16 == 3.875
    assert PolarQuantizer(((128, 4),)).scale_count == 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [2, 6, 16, 34, 64, 80, 96, 112, 128, 192, 256, 576])
def test_bits_are_counted_exactly(width, bits):
    """No byte beyond the angles' bits, rounded up once for either width of code, and 2 bytes per scale."""
    first, higher, levels = polar_levels(width, bits)
    higher_angles = sum(width >> level for level in range(2, levels + 1))
    polar, prod = PolarQuantizer(((width, bits),)), ProdQuantizer(((width, bits),))
    assert polar.code_bytes == -(-width // 2 * first // 8) + -(-higher_angles * higher // 8)
    assert polar.scale_count * 2**levels == width
    assert prod.code_bytes == (packed_bytes(width, bits - 1) if bits > 1 else 0) + packed_bytes(width, 1)
    assert prod.scale_count == min(bits, 2)
    for quantizer in (polar, prod):
        packed = quantizer.encode(normal(3, 2, width))
        assert packed.codes.shape[-1] == quantizer.code_bytes and packed.codes.dtype == torch.uint8
        assert packed.scales.shape[-1] == quantizer.scale_count
        assert packed.scales.dtype == quantizer.scale_dtype == torch.bfloat16
        assert packed.nbytes == 6 * quantizer.vector_bytes and packed.shape == (3, 2, width)
        assert quantizer.bits_per_element == 8 * packed.nbytes / packed.shape.numel()


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_coded_as_if_they_were_alone(form):
    for parts in PARTS:
        vectors, start = normal(5, 64), 0
        packed = form(parts).encode(vectors)
        assert form(parts).dim == 64 and form([list(part) for part in parts]) == form(parts)
        for width, bits in parts:
            own = vectors[:, start : start + width]
            alone = form(((width, bits),)).encode(own).decode()
            assert torch.equal(packed.decode()[:, start : start + width], alone)
            start += width


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "parts, message",
    [
        (((64, 5),), "bits must be 1, 2, 3 or 4; got 5"),
        (((64, 0),), "bits must be 1, 2, 3 or 4; got 0"),
        (((63, 4),), "width of a part must be even and positive; got 63"),
        (((0, 4),), "width of a part must be even and positive; got 0"),
    ],
)
def test_bad_parts_say_what_is_wrong(form, parts, message):
    with pytest.raises(ValueError, match=message):
        form(parts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", PARTS)
def test_finite_for_every_finite_input(form, parts):
    quantizer, transform = form(parts), Transform.rotation("haar", tuple(width for width, _ in parts))
    shapes = torch.cat([torch.eye(64)[:3], torch.ones(1, 64), normal(4, 64).float().sign()])
    for size in (0.0, 1e-45, 1e-40, 1e-30, 1.0, 6e4, 1e30, 1e38, torch.finfo(torch.float32).max):
        for vectors in (size * shapes, size * shapes.double()):
            packed = quantize(vectors, quantizer, transform)
            assert packed.scales.isfinite().all() and dequantize(packed, transform).isfinite().all()
            if size == 0:
                assert not dequantize(packed, transform).any()
    with pytest.raises(ValueError, match="only finite vectors"):
        quantize(shapes * math.inf, quantizer, transform)


@settings(max_examples=25, deadline=None)
@given(
    index=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    form=st.sampled_from(FORMS),
    parts=st.sampled_from(PARTS),
    shape=st.sampled_from([(12,), (12, 1), (12, 2, 5)]),
    seed=st.integers(0, 9),
)
def test_selecting_codes_equals_coding_the_selection(index, form, parts, shape, seed):
    vectors = normal(*shape, 64, seed=seed).bfloat16()
    quantizer, transform = form(parts), Transform.rotation("hadamard", tuple(width for width, _ in parts))
    packed, index = quantize(vectors, quantizer, transform), torch.tensor(index)
    for selected, chosen in (
        (packed[index], vectors[index]),
        (packed[3:9], vectors[3:9]),
        (packed[index[0]], vectors[index[0]]),
        (packed.map(lambda t: t.repeat_interleave(2, dim=0)), vectors.repeat_interleave(2, dim=0)),
    ):
        again = quantize(chosen, quantizer, transform)
        assert torch.equal(selected.codes, again.codes) and torch.equal(selected.scales, again.scales)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [96, 112, 192])
def test_batch_shape_decides_no_code_where_sums_cancel(form, dim):
    """Few-bit numbers make coordinates that are 0 or equal: angles on the boundary of two codes."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-3, 4, (1000, dim), generator=generator).double()
    quantizer, transform = form(((dim, 4),)), Transform.rotation("hadamard", (dim,))
    packed = quantize(vectors, quantizer, transform)
    for rows in (1, 3, 17):
        pieces = [quantize(piece, quantizer, transform) for piece in vectors.split(rows)]
        assert torch.equal(torch.cat([piece.codes for piece in pieces]), packed.codes)
        assert torch.equal(torch.cat([piece.scales for piece in pieces]), packed.scales)


@pytest.mark.parametrize("form", FORMS)
def test_attention_products_read_both_forms(form):
    vectors, rows, weights = normal(2, 3, 700, 32), normal(2, 3, 4, 32).float(), torch.rand(2, 3, 4, 700)
    packed = form(((32, 3),)).encode(vectors)
    torch.testing.assert_close(code_scores(rows, packed), rows @ packed.decode().mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(code_sums(weights, packed), weights @ packed.decode(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "form, key_bits", [("prod", 4), ("polar", 3), ("prod", "1/2x3+1/2x2"), ("polar", "1/4x4+3/4x2")]
)
def test_a_cache_in_either_form_with_either_attention(form, key_bits):
    """Attention on codes equals attention on decoded tensors, and both come near the dense cache."""
    model = tiny_backbone("llama", head_dim=16)
    prompt = torch.randint(3, 259, (2, 60), generator=torch.Generator().manual_seed(0))
    fields = {"form": form, "key_bits": key_bits, "window": 8, "block": 8, "mean_group": 16}
    logits, tokens, caches = {}, {}, {}
    with torch.no_grad():
        for implementation in ("sdpa", "turboquant"):
            model.set_attn_implementation(implementation)
            caches[implementation] = cache = TurboQuantCache(model.config, **fields)
            model(prompt[:, :40], past_key_values=cache)
            logits[implementation] = model(prompt[:, 40:], past_key_values=cache).logits
            tokens[implementation] = model.generate(
                prompt,
                past_key_values=TurboQuantCache(model.config, **fields),
                max_new_tokens=12,
                do_sample=False,
            )
        model.set_attn_implementation("sdpa")
        dense = model(prompt).logits[:, 40:]
    assert caches["turboquant"].layers[0].packed_length == 48
    assert (
        type(caches["sdpa"].layers[0].packed_keys[0].coding.quantizer)
        is dict(zip(("prod", "polar"), FORMS))[form]
    )
    torch.testing.assert_close(logits["turboquant"], logits["sdpa"], atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens["turboquant"], tokens["sdpa"])
    assert 0 < (logits["sdpa"] - dense).norm() < 0.6 * dense.norm()
