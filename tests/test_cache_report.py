"""What a cache says that it holds, against a walk over every tensor that it reaches."""

import json

import pytest
import torch
from backbones import tiny_backbone
from test_cache_files import CASES, GEMMA3, SMALL, greedy, make, prompt, step
from transformers import LlamaConfig

from msa_hf.modeling.cache_turboquant import TurboQuantCache

PARTS = ("key_codes", "value_codes", "key_scales", "value_scales", "means", "exact", "window", "native")
PARTS += ("transforms", "other", "reserved")


def kept_alive(value, storages=None, seen=None):
    """Bytes of every storage behind the tensors in attributes, slots and items, each counted once."""
    top = storages is None
    storages, seen = ({}, set()) if top else (storages, seen)
    if id(value) not in seen and not isinstance(value, (type, str, bytes, int, float)):
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in [*value.keys(), *value.values()]:
                kept_alive(item, storages, seen)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                kept_alive(item, storages, seen)
        else:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            for item in [
                *getattr(value, "__dict__", {}).values(),
                *(getattr(value, name, None) for name in slots),
            ]:
                kept_alive(item, storages, seen)
    return sum(storages.values()) if top else None


def llama_config(dim=128, heads=1, layers=2):
    return LlamaConfig(
        hidden_size=dim * heads * 2,
        num_attention_heads=heads * 2,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        head_dim=dim,
        intermediate_size=8,
        vocab_size=8,
    )


def filled(cache, tokens, heads, dim, batch=1, dtype=torch.bfloat16, chunk=8192):
    for layer in range(len(cache.layers)):
        generator = torch.Generator().manual_seed(layer)
        for start in range(0, tokens, chunk):
            size = (2, batch, heads, min(chunk, tokens - start), dim)
            cache.update(*torch.randn(size, generator=generator).to(dtype), layer)
    return cache


@pytest.mark.parametrize(("tokens", "layers", "recent"), [(1536, 2, 128), (2048, 2, 192), (32768, 1, 640)])
def test_the_report_equals_a_walk_over_every_tensor(tokens, layers, recent):
    cache = filled(TurboQuantCache(llama_config(layers=layers), key_bits=4, value_bits=4), tokens, 1, 128)
    report = cache.report()
    assert report.total == kept_alive(cache)
    assert report.total == sum(getattr(report, name) for name in PARTS)
    assert (report.tokens, report.batch, report.packed_tokens) == (tokens, 1, tokens - recent)
    # Counted by hand: 1 head, 64 bytes of 4 bit codes, a mean for each group of tokens.
    vectors = layers * (tokens - recent)
    assert report.packed_vectors == vectors
    assert report.key_codes == report.value_codes == vectors * 64
    group, exact = cache.settings.mean_group, cache.settings.exact_tokens
    assert report.means == layers * -(-(tokens - recent) // group) * 128 * 2
    assert report.window == layers * 2 * recent * 128 * 2
    assert report.exact == layers * exact * (2 * 128 * 2 + 4 + 4)
    assert report.transforms == 128 * 128 * (8 + 4)  # one rotation for all layers, keys and values
    assert report.native == 0
    assert report.dense == layers * tokens * 2 * 128 * 2
    assert report.compression == report.dense / report.total


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_bytes_per_token_and_head_at_128_dimensions_and_4_bits(scale_bits):
    scales = {"key_scale_bits": scale_bits, "value_scale_bits": scale_bits}
    cache = TurboQuantCache(llama_config(), key_bits=4, value_bits=4, window_grows_from=None, **scales)
    group = cache.settings.mean_group
    report = filled(cache, 16 * group + 128, 1, 128).report()
    exact = 64 + 64 + 2 * scale_bits // 8 + 2 * 128 / group  # codes, scales, and the share of a mean
    assert report.bytes_per_token_and_head == pytest.approx(exact, abs=1e-9)
    assert report.key_scales == report.value_scales == report.packed_vectors * scale_bits // 8
    assert report.key_bits == pytest.approx(4 + scale_bits / 128 + 16 / group)
    assert report.value_bits == pytest.approx(4 + scale_bits / 128)
    assert report.bits == pytest.approx(8 * exact / 256)
    assert report.marginal_compression == pytest.approx(16 / report.bits)
    if scale_bits == 8:
        assert report.bytes_per_token_and_head <= 132


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_cache_is_counted_whole(name, tmp_path):
    model, cache = make(name, left_padding=[5, 0])
    ids, mask = prompt(padding=[5, 0])
    assert cache.report().tokens == cache.report().compression == cache.report().bits == 0
    assert cache.report().total == kept_alive(cache)
    greedy(model, cache, step(model, cache, ids, mask), mask, 14)
    report = cache.report()
    assert report.total == kept_alive(cache) == sum(getattr(report, part) for part in PARTS)
    assert min(getattr(report, part) for part in PARTS) >= 0
    assert (report.tokens, report.batch) == (51, 2)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.report().total == kept_alive(cache)
    cache.save_pretrained(tmp_path)
    loaded = TurboQuantCache.from_pretrained(tmp_path, model)
    # Nothing but room in the window: neither growth nor the file, which would be held as a whole.
    windows = [layer.recent for layer in loaded.packed_layers]
    room = sum(w.keys.nbytes + w.values.nbytes - sum(t.nbytes for t in w.view()) for w in windows)
    assert loaded.report().reserved == room
    assert loaded.report().total == kept_alive(loaded) <= cache.report().total


def test_native_layers_count_as_they_are_and_slices_count_what_they_keep_alive():
    model = tiny_backbone("gemma3_text", **GEMMA3)
    cache = TurboQuantCache(model.config, **SMALL)
    filled(cache, 100, 2, 16, dtype=torch.float32)
    report = cache.report()
    sliding = 2 * (2 * 2 * 15 * 16) * 4  # two layers, keys and values, 15 tokens
    assert sliding <= report.native <= sliding + 2 * 8  # Transformers keeps its window as a tensor, too
    assert report.reserved >= 2 * (2 * 2 * (100 - 15) * 16) * 4  # the prefill that the slices hold
    assert report.total == kept_alive(cache)


def test_a_prefilled_cache_holds_no_reserve_of_codes():
    cache = TurboQuantCache(tiny_backbone("llama").config, **SMALL)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 2, 200, 8))
    room = sum(layer.recent.keys.nbytes - layer.recent.view()[0].nbytes for layer in cache.layers)
    assert cache.layers[0].packed_length > 2 * cache.settings.mean_group
    means = sum(layer.means.reserved_bytes for layer in cache.layers)
    assert cache.report().reserved == 2 * room + means


def test_growth_and_crop_move_bytes_between_reserve_and_codes():
    cache = filled(TurboQuantCache(llama_config(64), **SMALL), 400, 1, 64)
    filled(cache, 8, 1, 64, chunk=1)
    grown = cache.report()
    cache.crop(-208)
    cropped = cache.report()
    assert (grown.packed_tokens, cropped.packed_tokens) == (400, 200)
    assert cropped.key_codes * 2 == grown.key_codes and cropped.window == 0
    assert cropped.total == grown.total == kept_alive(cache)
    freed = ("key_codes", "value_codes", "key_scales", "value_scales", "means", "window")
    assert cropped.reserved - grown.reserved == sum(
        getattr(grown, name) - getattr(cropped, name) for name in freed
    )


def test_a_report_prints_as_a_table_and_travels_as_json():
    report = filled(TurboQuantCache(llama_config(64)), 1000, 1, 64).report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total"] == report.total and data["bits"] == report.bits
    text = str(report)
    for part in PARTS:
        assert f"{getattr(report, part):,} bytes" in text, part
    assert "1,000 tokens" in text and f"{report.compression:.2f} times smaller" in text
    assert max(map(len, text.splitlines())) < 90
