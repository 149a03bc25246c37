"""Calibration of caches: the fit against closed forms, the allocation against brute force, both as used."""

import importlib.util
import itertools
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from backbones import CACHE_BACKBONES, cache_backbone
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoConfig

from msa_hf import modeling
from msa_hf.configs import caches_folder
from msa_hf.modeling import calibration_files
from msa_hf.modeling.bit_allocation import Unit, allocate, coding_costs, codings, spec, vector_bits
from msa_hf.modeling.cache_settings import CacheSettings, parse_bits
from msa_hf.modeling.cache_turboquant import TurboQuantCache
from msa_hf.modeling.calibration_files import Calibration, identity, register_calibrations
from msa_hf.modeling.calibration_plan import CalibrationPlan, cut_segments, halves, spaced
from msa_hf.modeling.codebooks import distortion
from msa_hf.modeling.coding_effect import ReferenceText
from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError
from msa_hf.modeling.fitted_transforms import FittedTransforms
from msa_hf.modeling.key_value_gradients import context_gradients, fisher_direction
from msa_hf.modeling.transform_fitting import fit_transform, matrix_power

SMALL = CacheSettings(window=8, block=8, mean_group=16, sinks=2, extremes=2)
DERIVED = ("layer_types", "sliding_windows")  # of the identity of a model
PLAN = {"context": 96, "continuation": 32, "stride": 1, "probe_tokens": 16}


def texts(count=5, tokens=130, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (tokens,), generator=generator).tolist() for _ in range(count)]


def calibrated(model, average_bits=3.2, settings=SMALL, **options):
    return TurboQuantCache.calibrate(model, texts(), average_bits, settings=settings, **{**PLAN, **options})


@pytest.fixture(scope="module")
def wide():
    """A model whose heads are wide enough to be cut into parts."""
    return cache_backbone("llama", head_dim=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def calibration(wide):
    return calibrated(wide, 2.9)


def covariance(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return root @ root.mT / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def independent(spread, need):
    """Vectors [1, n, D] and gradients [1, 1, n, D] whose moments are exactly those of independent ones."""
    dim = spread.shape[0]
    vectors, gradients = (torch.linalg.cholesky(matrix).mT * dim**0.5 for matrix in (spread, need))
    pairs = [(x, g) for x in vectors for g in gradients]
    return torch.stack([x for x, _ in pairs])[None], torch.stack([g for _, g in pairs])[None, None]


@pytest.mark.parametrize("dim", [2, 6, 16])
def test_fit_is_the_closed_form_for_independent_vectors_and_gradients(dim):
    """P S P = M up to a factor: the geometric mean of S^-1 and M. E' S E and E^-1 M E^-T are one diagonal."""
    spread, need = covariance(dim, 1), covariance(dim, 2)
    encode = fit_transform(*independent(spread, need), shrinkage=0.0, steps=2)[0]
    metric, root = encode @ encode.mT, matrix_power(spread, 0.5)
    back = torch.linalg.inv(root)
    expected = back @ matrix_power(root @ need @ root, 0.5) @ back
    torch.testing.assert_close(metric / metric.trace(), expected / expected.trace(), atol=1e-9, rtol=1e-6)
    coded = encode.mT @ spread @ encode
    inverse = torch.linalg.inv(encode)
    met = inverse @ need @ inverse.mT
    for matrix in (coded, met):
        torch.testing.assert_close(matrix, torch.diag(matrix.diagonal()), atol=1e-9, rtol=1e-6)
        assert (matrix.diagonal().diff() < 1e-12).all()
    torch.testing.assert_close(coded / coded.trace(), met / met.trace(), atol=1e-9, rtol=1e-6)


def test_fit_of_commuting_covariances_scales_channels():
    spread, need = torch.tensor([4.0, 1, 9, 0.25]).double(), torch.tensor([1.0, 16, 4, 0.25]).double()
    encode = fit_transform(*independent(spread.diag(), need.diag()), shrinkage=0.0, steps=2)[0]
    expected = (need / spread) ** 0.5
    metric = encode @ encode.mT
    torch.testing.assert_close(
        metric / metric.trace(), expected.diag() / expected.sum(), atol=1e-9, rtol=1e-6
    )
    assert encode.abs().argmax(dim=0).tolist() == (spread * need).argsort(descending=True).tolist()


def test_fit_is_better_than_any_other_metric_where_vectors_and_gradients_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    latent = torch.randn(3, 4000, 8, generator=generator, dtype=torch.float64)
    vectors = latent @ mix * latent[..., :1].abs()
    gradients = (
        torch.randn(2, 3, 4000, 8, generator=generator, dtype=torch.float64) * latent[..., 1:2]
    ) @ mix.mT

    def cost(encode):
        return coding_costs(vectors, gradients, encode, [((8, 2),)]).sum(dim=-1)

    best = cost(fit_transform(vectors, gradients, shrinkage=0.0, steps=12))
    assert (best < 0.95 * cost(torch.eye(8, dtype=torch.float64).expand(3, 8, 8))).all()
    fitted = fit_transform(vectors, gradients, shrinkage=0.0, steps=12)
    for _ in range(20):
        change = torch.eye(8) + 0.1 * torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
        assert (cost(fitted @ change) > best * (1 - 1e-4)).all()


def test_fit_of_a_head_that_nothing_depends_on_is_finite():
    encode = fit_transform(torch.randn(2, 50, 8), torch.zeros(2, 2, 50, 8))
    assert encode.isfinite().all() and torch.linalg.inv(encode).isfinite().all()


def test_costs_are_those_of_independent_noise():
    """Simulated: noise of |y|^2 D / width in each coordinate of a part, decoded and met by the gradient."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 60, 24, generator=generator, dtype=torch.float64)
    gradients = torch.randn(1, 1, 60, 24, generator=generator, dtype=torch.float64)
    encode = torch.randn(1, 24, 24, generator=generator, dtype=torch.float64)
    parts = ((8, 3), (16, 1))
    [cost] = coding_costs(vectors, gradients, encode, [parts])[0]
    coordinates, total = vectors @ encode, 0.0
    for _ in range(3000):
        noise = torch.randn(1, 60, 24, generator=generator, dtype=torch.float64)
        start = 0
        for width, bits in parts:
            size = coordinates[..., start : start + width].square().sum(dim=-1, keepdim=True)
            noise[..., start : start + width] *= (size * distortion(width, bits) / width).sqrt()
            start += width
        total += ((noise @ torch.linalg.inv(encode)) * gradients[0]).sum(dim=-1).square().mean() / 2
    assert cost == pytest.approx(float(total / 3000), rel=0.03)


def test_codings_and_their_bytes():
    choices = codings(24)
    assert len(choices) == len(set(choices)) == 6 + 2 * 15
    assert all(sum(width for width, _ in parts) == 24 and parts[0][1] >= parts[-1][1] for parts in choices)
    assert vector_bits(((8, 6), (16, 1)), 8) == 8 * 6 + 16 + 16
    assert all(parse_bits(spec(parts), 24) == parts for parts in choices)
    assert codings(10) == [((10, bits),) for bits in range(1, 7)]
    assert vector_bits(((10, 1),), 8) == 24  # whole bytes


def brute_force(units, budget):
    fitting = [
        sum(float(unit.costs[place]) for unit, place in zip(units, places))
        for places in itertools.product(*(range(len(unit.costs)) for unit in units))
        if sum(int(unit.bits[place]) for unit, place in zip(units, places)) <= budget
    ]
    return min(fitting, default=None)


def outcome(units, chosen):
    return (
        sum(float(unit.costs[place]) for unit, place in zip(units, chosen)),
        sum(int(unit.bits[place]) for unit, place in zip(units, chosen)),
    )


@hypothesis_settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), budget=st.integers(0, 60))
def test_allocation_near_brute_force(seed, count, budget):
    """Never over budget, never worse than the best by more than one unit's step."""
    generator = torch.Generator().manual_seed(seed)
    units = [
        Unit(torch.rand(6, generator=generator).double(), torch.randint(1, 20, (6,), generator=generator))
        for _ in range(count)
    ]
    best = brute_force(units, budget)
    if best is None:
        with pytest.raises(ValueError, match=f"{budget} bits do not hold {count} units"):
            allocate(units, budget)
        return
    cost, bits = outcome(units, allocate(units, budget))
    assert bits <= budget
    assert best - 1e-12 <= cost <= best + max(float(unit.costs.max() - unit.costs.min()) for unit in units)


@hypothesis_settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(4, 24))
def test_allocation_equals_brute_force_where_costs_are_convex(seed, budget):
    """4^-bits times a weight each, in steps of one bit: the best first choice stays the best."""
    weights = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    bits = torch.arange(1, 7)
    units = [Unit(weight * 4.0 ** -bits.double(), bits) for weight in weights]
    cost, spent = outcome(units, allocate(units, budget))
    assert cost == pytest.approx(brute_force(units, budget), rel=1e-9) and spent <= budget


def test_fisher_directions_have_the_covariance_of_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sample = fisher_direction(logits.expand(200_000, 4), torch.Generator().manual_seed(0)).double()
    chance = logits.softmax(-1)[0].double()
    expected = chance.diag() - chance[:, None] * chance
    torch.testing.assert_close(sample.mT @ sample / len(sample), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_gradients_predict_the_measured_kl(wide, kind):
    """KL of a small change dx of a layer's keys or values = mean over directions of (sum of dx . g)^2 / 2."""
    [ids] = texts(1)
    plain = CacheSettings(window=0, sinks=0, mean_group=0, block=8)
    samples = context_gradients(wide, [ids[:128]], 96, plain, directions=300, stride=1)[kind, 1]
    vectors, gradients = samples.vectors[0].float(), samples.gradients[0].float()
    assert vectors.shape == (2, 96, 32) and gradients.shape == (300, 2, 96, 32)
    change = 0.02 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    predicted = (gradients * change).sum(dim=(1, 2, 3)).square().mean() / 2 / 32
    reference = ReferenceText(wide, ids[:128], 96)
    states = getattr(reference.cache.layers[1], kind) + change[None]
    measured = reference.divergence({(kind, 1): states})
    assert measured == pytest.approx(float(predicted), rel=0.25)
    assert reference.divergence({}) == 0.0


def test_the_model_is_as_it_was(wide):
    wide.set_attn_implementation("turboquant")
    wide.train()
    frozen = next(wide.parameters())
    frozen.requires_grad_(False)
    calibrated(wide, rounds=0)
    assert wide.config._attn_implementation == "turboquant" and wide.training
    assert [p for p in wide.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in wide.parameters())
    frozen.requires_grad_(True)
    wide.eval()
    wide.set_attn_implementation("sdpa")


def head_specs(calibration):
    settings = calibration.settings
    for kind, bits in (("keys", settings.key_bits), ("values", settings.value_bits)):
        for row in bits:
            if isinstance(row, list):
                yield from ((kind, parse_bits(own, 32)) for own in row)


@pytest.mark.parametrize("average_bits", [2.1, 2.4, 3.3])
def test_budget_and_floors_hold_in_a_filled_cache(wide, average_bits):
    found = calibrated(wide, average_bits, key_floor=1.25, value_floor=1.0)
    for kind, parts in head_specs(found):
        assert sum(width * bits for width, bits in parts) >= 32 * {"keys": 1.25, "values": 1.0}[kind]
    cache = TurboQuantCache(wide.config, found)
    with torch.no_grad():
        wide(torch.tensor([texts(1, 200)[0]]), past_key_values=cache)
    report = cache.report()
    assert report.packed_tokens % SMALL.mean_group == 0
    assert report.bits == pytest.approx(found.details["bits"]) and report.bits <= average_bits
    assert report.key_bits == pytest.approx(found.details["key_bits"])
    assert report.value_bits == pytest.approx(found.details["value_bits"])
    assert average_bits - 0.1 < report.bits  # the budget is used


def test_the_seed_decides_everything(wide, calibration):
    assert calibrated(wide, 2.9).sha256 == calibration.sha256
    assert calibrated(wide, 2.9, seed=1).sha256 != calibration.sha256


def test_transforms_are_inverted(wide, calibration):
    cache = TurboQuantCache(wide.config, calibration)
    with torch.no_grad():
        wide(torch.tensor([texts(1)[0]]), past_key_values=cache)
    for layer in cache.packed_layers:
        for part in (*layer.packed_keys, *layer.packed_values):
            transform = part.coding.transform
            assert (
                transform.encode.shape == (len(part.coding.heads), 32, 32) and not part.coding.sort_channels
            )
            product = transform.encode @ transform.decode.double()
            torch.testing.assert_close(product, torch.eye(32).double().expand_as(product), atol=1e-4, rtol=0)


def divergence(model, found, rows=3):
    measured = [ReferenceText(model, ids[:128], 96) for ids in texts(rows, seed=9)]
    settings, transforms = (
        (found.settings, found.transforms) if isinstance(found, Calibration) else (found, None)
    )
    return sum(one.divergence(one.coded(settings, transforms)) for one in measured) / rows


@pytest.mark.parametrize("transforms", [True, False])
def test_lower_kl_than_uniform_bits_at_no_more_bytes(wide, transforms):
    """On texts that it has not seen; 2 bits everywhere take 2 + .25 scales + .5 means of 16 tokens."""
    plain = CacheSettings(**{**SMALL.to_dict(), "key_bits": 2, "value_bits": 2})
    found = calibrated(wide, 2.75, transforms=transforms)
    assert found.details["bits"] <= 2.75 and (found.transforms is not None) == transforms
    assert divergence(wide, found) < 0.8 * divergence(wide, plain)


def test_details_say_what_was_promised_and_measured(calibration):
    details = calibration.details
    assert details["bits"] <= details["average_bits"] == 2.9
    assert details["text_tokens"] == [128] * 5 and details["plan"]["context"] == 96
    assert 0.2 < details["measured_kl"] / details["predicted_kl"] < 5
    assert json.loads(json.dumps(details)) == details


@pytest.mark.parametrize("kind", CACHE_BACKBONES)
def test_same_tokens_as_the_decoded_cache_under_eager_attention(kind):
    model = cache_backbone(kind)
    found = calibrated(model, 3.6)
    tokens = {}
    for attention in ("turboquant", "eager"):
        model.set_attn_implementation(attention)
        prompt = torch.tensor([row[:70] for row in texts(2)])
        cache = TurboQuantCache(model.config, found)
        tokens[attention] = model.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert cache.packed_layers and all(layer.packed_length >= 56 for layer in cache.packed_layers)
    assert torch.equal(tokens["turboquant"], tokens["eager"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = cache_backbone("llama").to(dtype)
    found = calibrated(model, 3.6, rounds=0)
    assert torch.tensor(found.details["measured_kl"]).isfinite()
    assert all(matrix.isfinite().all() for matrix in found.transforms.matrices.values())


def test_dense_layers_stay_dense(wide):
    settings = CacheSettings(**{**SMALL.to_dict(), "dense_layers": (0, -1)})
    found = calibrated(wide, 3.2, settings)
    assert set(found.transforms.matrices) == {"layers.1.keys", "layers.1.values"}
    assert len(TurboQuantCache(wide.config, found).packed_layers) == 1


def test_round_trip_of_the_folder(tmp_path, calibration):
    calibration.save_pretrained(tmp_path)
    read = Calibration.from_pretrained(tmp_path)
    assert read.sha256 == calibration.sha256 and read.settings == calibration.settings
    assert (read.model, read.weights, read.details) == (
        calibration.model,
        calibration.weights,
        calibration.details,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.json", "calibration.safetensors"}


def test_a_calibration_that_another_copy_of_the_code_read(tmp_path, wide, calibration):
    """Remote code has classes of its own."""
    calibration.save_pretrained(tmp_path)
    folder = Path(modeling.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "modeling_of_another", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        other = importlib.import_module(f"{spec.name}.calibration_files").Calibration
        assert other is not Calibration
        cache = TurboQuantCache(wide.config, other.from_pretrained(tmp_path))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == spec.name]:
            del sys.modules[name]
    assert cache.settings.to_dict() == calibration.settings.to_dict()
    assert cache.packed_layers[0].transforms.matrices.keys() == calibration.transforms.matrices.keys()


def test_bit_maps_alone_are_one_file(tmp_path, wide, calibration):
    calibration.save_pretrained(tmp_path)
    calibrated(wide, 2.9, transforms=False, rounds=0).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert Calibration.from_pretrained(tmp_path).transforms is None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda index: index.pop("settings"), "is damaged: KeyError"),
        (
            lambda index: index.update(format="other"),
            "not a file of the format 'msa_hf cache calibration'",
        ),
        (lambda index: index.update(format_version=9), "format_version must be 1 .*; got 9"),
        (lambda index: index["settings"].update(key_bits="x"), "is damaged: .*key_bits must be"),
        (lambda index: index["transforms"].update(bytes=3), "must have 3 bytes"),
        (lambda index: index["transforms"].update(sha256="0"), "SHA-256 differs"),
        (lambda index: index["transforms"].update(name="../x"), "plain file names"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, calibration, damage, message):
    calibration.save_pretrained(tmp_path)
    path = tmp_path / "calibration.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    with pytest.raises(MemoryFormatError, match=message):
        Calibration.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no calibration in"):
        Calibration.from_pretrained(tmp_path)


def test_a_model_of_another_shape_is_named(calibration):
    with pytest.raises(MemoryMismatchError, match="head_dim is 32 there and 16 in this model"):
        TurboQuantCache(cache_backbone("llama", head_dim=16).config, calibration)
    with pytest.raises(MemoryMismatchError, match="model_type is 'llama' there and 'qwen3'"):
        TurboQuantCache(cache_backbone("qwen3", head_dim=32).config, calibration)


def test_saved_caches_go_on_with_their_transforms(tmp_path, wide, calibration):
    prompt = torch.tensor([texts(1)[0]])
    wide.set_attn_implementation("turboquant")
    cache = TurboQuantCache(wide.config, calibration)
    with torch.no_grad():
        wide(prompt, past_key_values=cache)
    cache.save_pretrained(tmp_path, wide)
    read = TurboQuantCache.from_pretrained(tmp_path, wide)
    report, original = read.report(), cache.report()
    assert report.total == sum(getattr(report, name) for name in calibration_parts())
    assert (report.transforms, report.bits) == (original.transforms, original.bits)
    following = torch.tensor([texts(1, seed=3)[0][:20]])
    with torch.no_grad():
        logits = [wide(following, past_key_values=one).logits for one in (cache, read)]
    assert torch.equal(*logits)
    wide.set_attn_implementation("sdpa")


def calibration_parts():
    names = (
        "key_codes value_codes key_scales value_scales means exact window native transforms other reserved"
    )
    return names.split()


def test_caches_share_what_was_fitted(wide, calibration):
    one, other = (TurboQuantCache(wide.config, calibration) for _ in range(2))
    for cache in (one, other):
        with torch.no_grad():
            wide(torch.tensor([texts(1)[0]]), past_key_values=cache)
    parts = [cache.packed_layers[1].packed_keys[0].coding.transform for cache in (one, other)]
    assert parts[0] is parts[1]


@pytest.fixture
def registered(tmp_path, monkeypatch, calibration):
    monkeypatch.setattr(calibration_files, "_folders", [])
    calibration.save_pretrained(tmp_path / "tiny-2.7bit")
    register_calibrations(tmp_path)
    register_calibrations(tmp_path)
    return tmp_path


def test_named_presets_use_what_is_registered_for_the_architecture(wide, calibration, registered, caplog):
    with caplog.at_level(logging.INFO, logger="msa_hf"):
        cache = TurboQuantCache(wide.config, "2.7bit", window=16)
    assert str(registered / "tiny-2.7bit") in caplog.text
    assert cache.settings.key_bits == calibration.settings.key_bits and cache.settings.window == 16
    assert set(cache.transforms.matrices) == set(calibration.transforms.matrices)
    plain = TurboQuantCache(wide.config, "1.8bit")
    assert plain.transforms is None and not isinstance(plain.settings.key_bits, list)
    assert TurboQuantCache(wide.config, "2.7bit", key_bits=4).transforms is None
    other = TurboQuantCache(cache_backbone("llama", vocab_size=300, head_dim=32).config, "2.7bit")
    assert other.transforms is None


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("preset, most", [("2.7bit", 2.7), ("1.8bit", 1.8)])
def test_presets_without_a_calibration_hold_what_their_names_say(monkeypatch, preset, most, dim):
    monkeypatch.setattr(calibration_files, "_folders", [])
    model = cache_backbone("llama", head_dim=dim, num_attention_heads=1, num_key_value_heads=1)
    cache = TurboQuantCache(model.config, preset, window=64)
    with torch.no_grad():
        model(torch.tensor([texts(1, 320)[0]]), past_key_values=cache)
    assert cache.report().packed_tokens == 256 and cache.report().bits <= most


@pytest.mark.parametrize("folder", sorted(caches_folder().glob("*/")), ids=lambda folder: folder.name)
def test_shipped_calibrations_serve_their_models(folder):
    """By name, for a configuration of the same architecture, within their bits, the command beside them."""
    found, preset = Calibration.from_pretrained(folder), folder.name.rpartition("-")[2]
    assert found.details["bits"] <= float(preset.removesuffix("bit")) == found.details["average_bits"]
    command = f"msa-hf calibrate-cache {folder.name.removesuffix(f'-{preset}')}"
    assert command in (folder / "README.md").read_text()
    config = AutoConfig.for_model(**{k: v for k, v in found.model.items() if k not in DERIVED})
    cache = TurboQuantCache(config, preset)
    assert cache.settings == found.settings and cache.transforms is not None
    # One layer, filled to whole groups, holds what its bit map says.
    heads, dim = found.model["num_key_value_heads"], found.model["head_dim"]
    states = torch.randn(2, 1, heads, 256 + found.settings.window, dim)
    cache.update(*states, 3)
    layer = cache.layers[3]
    held = sum(part.codes.view().nbytes + part.scales.view().nbytes for part in layer._parts())
    specs = [
        parse_bits(own, dim) for kind in ("keys", "values") for own in found.settings.specs(kind, 3, heads)
    ]
    assert layer.packed_length == 256 and held * 8 == 256 * sum(vector_bits(parts, 8) for parts in specs)


def test_segments_take_turns():
    rows = [list(range(10)), list(range(100, 106)), [1, 2]]
    plan = CalibrationPlan(context=2, continuation=1, segments=4)
    segments, owners = cut_segments(rows, plan)
    assert segments == [[0, 1, 2], [100, 101, 102], [3, 4, 5], [103, 104, 105]] and owners == [0, 1, 0, 1]
    assert halves(owners) == ([0, 2], [1, 3]) == halves([7, 7, 7, 7])
    assert halves([0, 3, 4, 0]) == ([0, 2, 3], [1])


def test_spaced_numbers():
    assert (
        spaced([1, 3, 5, 7, 9], 3) == [1, 5, 9] and spaced([1, 3], 5) == [1, 3] and spaced([4, 6], 1) == [4]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"texts": "one text"}, "texts must be a list"),
        ({"texts": [[5] * 100]}, r"two segments of 128 tokens .*; got 0 from 1 texts of \[100\]"),
        ({"texts": [[5] * 130]}, "two segments of 128 tokens"),
        ({"texts": ["words " * 900]}, "pass tokenizer=|give one, or token ids"),
        ({"average_bits": 1.2}, "average_bits = 1.2 is too few for this model"),
        ({"segments": 0}, "segments must be a whole number of at least 1; got 0"),
        ({"rounds": -1}, "rounds must be at least 0; got -1"),
    ],
)
def test_misuse_is_named(wide, arguments, message):
    arguments = {"texts": texts(), "average_bits": 3.0, "settings": SMALL, **PLAN, **arguments}
    with pytest.raises(ValueError, match=message):
        TurboQuantCache.calibrate(wide, **arguments)


def test_unknown_options_are_refused(wide):
    with pytest.raises(TypeError, match="layers"):
        TurboQuantCache.calibrate(wide, texts(), layers=3)


def test_identity_is_that_of_the_decoder():
    config = cache_backbone("llama").config
    found = identity(config)
    assert found["head_dim"] == 8 and found["vocab_size"] == 259 and found["num_key_value_heads"] == 2
    config.head_dim = None
    assert identity(config)["head_dim"] == 32 // 4


def test_fitted_transforms_of_some_heads():
    matrices = torch.eye(4).expand(3, 4, 4) * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    fitted = FittedTransforms({"layers.2.keys": matrices.half()})
    transform = fitted.transform("keys", 2, (2, 0), (4,), "none", 0)
    assert transform.encode.diagonal(dim1=-2, dim2=-1).tolist() == [[4.0] * 4, [1.0] * 4]
    assert transform.decode.diagonal(dim1=-2, dim2=-1).tolist() == [[0.25] * 4, [1.0] * 4]
    assert fitted.transform("keys", 2, (2, 0), (4,), "none", 0) is transform
    assert fitted.has("keys", 2) and not fitted.has("values", 2) and not fitted.has("keys", 0)
