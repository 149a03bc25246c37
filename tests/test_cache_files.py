"""Saved caches: they go on exactly, refuse what does not fit, and are whole at every moment."""

import json
import shutil
import sys
from dataclasses import fields, is_dataclass

import pytest
import torch
from backbones import tiny_backbone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from msa_hf.modeling import cache_files, memory_files
from msa_hf.modeling.bit_packing import packed_bytes, unpack
from msa_hf.modeling.cache_turboquant import TurboQuantCache
from msa_hf.modeling.entropy_coding import decode_stream, encode_streams
from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError
from msa_hf.modeling.fingerprint_msa import hash_decoder
from msa_hf.modeling.layer_turboquant import RecentWindow

SMALL = {"window": 8, "block": 4, "mean_group": 8, "sinks": 2, "extremes": 1}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}
BIT_MAP = [[4, 2], 3, ["1/2x4+1/2x2", 1]]

# name -> (model type, its fields, cache settings)
CASES = {
    "llama": ("llama", {}, {}),
    "llama 8 bit scales": ("llama", {}, {"key_scale_bits": 8, "value_scale_bits": 8, "key_bits": 3}),
    "llama bit map": ("llama", {"head_dim": 16}, {"key_bits": BIT_MAP, "value_bits": 2}),
    "llama parts": ("llama", {"head_dim": 16}, {"preset": "paper-2.5", "mean_group": 8}),
    "llama dense layer": ("llama", {}, {"dense_layers": [0, -1]}),
    "llama everything packed": ("llama", {}, {"window": 0}),
    "llama nothing kept": ("llama", {}, {"sinks": 0, "extremes": 0, "mean_group": 0}),
    "llama prod": ("llama", {"head_dim": 16}, {"form": "prod", "key_bits": 3}),
    "llama polar": ("llama", {"head_dim": 16}, {"form": "polar", "value_bits": 2}),
    "gemma3": ("gemma3_text", GEMMA3, {}),
    "lfm2": ("lfm2", LFM2, {}),
}


def make(name="llama", **changes):
    """(model, empty cache) of a case; a cache takes `changes`."""
    kind, own, settings = CASES[name]
    model = tiny_backbone(kind, **own)
    model.set_attn_implementation("turboquant")
    return model, TurboQuantCache(model.config, **{**SMALL, **settings, **changes})


def prompt(rows=2, tokens=37, padding=None):
    """(ids, mask) of random prompts, with this many padding tokens before each row."""
    ids = torch.randint(3, 259, (rows, tokens), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding or []):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def step(model, cache, ids, mask):
    """Logits [B, T, V] of the last tokens of `mask` read through the cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def greedy(model, cache, logits, mask, tokens=14):
    """(chosen tokens, their logits)."""
    chosen, seen = [], []
    for _ in range(tokens):
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        logits = step(model, cache, token, mask)
        chosen.append(token)
        seen.append(logits)
    return torch.cat(chosen, dim=1), torch.cat(seen, dim=1)


def held(value, path="cache", seen=None):
    """{path: tensor} of everything that a cache holds, found by attributes alone, without reserves."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return {path: value}
    if id(value) in seen or isinstance(value, type):
        return {}
    seen.add(id(value))
    if hasattr(value, "buffer") and hasattr(value, "length"):
        return {} if value.buffer is None else {path: value.buffer[:, :, : value.length]}
    if isinstance(value, RecentWindow):
        kept = {} if value.keys is None else {"keys": value.keys, "values": value.values}
        return {f"{path}.{name}": tensor[:, :, : value.length] for name, tensor in kept.items()}
    if is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, dict):
        items = value
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    else:
        items = getattr(value, "__dict__", {})
    return {p: t for name, item in items.items() for p, t in held(item, f"{path}.{name}", seen).items()}


def assert_same(first, second):
    """Two caches hold the same tensors, bit by bit."""
    first, second = held(first), held(second)
    assert sorted(first) == sorted(second)
    for path, tensor in first.items():
        assert tensor.dtype == second[path].dtype, path
        assert torch.equal(tensor, second[path]), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, cache) of a small cache on disk; the folder is not to be changed."""
    model, cache = make("llama", key_bits=3)
    ids, mask = prompt(1, 41)
    step(model, cache, ids, mask)
    folder = tmp_path_factory.mktemp("saved")
    cache.save_pretrained(folder, model)
    return folder, model, cache


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_cache_goes_on_exactly(name, coded, tmp_path):
    if coded:
        pytest.importorskip("constriction")
    padding = [5, 0]
    ids, mask = prompt(padding=padding)
    model, cache = make(name, left_padding=padding)
    logits = step(model, cache, ids, mask)
    cache.save_pretrained(tmp_path, model, entropy_coding=coded)
    loaded = TurboQuantCache.from_pretrained(tmp_path, model)
    assert_same(cache, loaded)
    expected, found = greedy(model, cache, logits, mask), greedy(model, loaded, logits, mask)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
    assert_same(cache, loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_window_keeps_its_dtype(dtype, tmp_path):
    model, cache = make("gemma3")
    model.to(dtype)
    ids, mask = prompt()
    step(model, cache, ids, mask)
    cache.save_pretrained(tmp_path, model)
    loaded = TurboQuantCache.from_pretrained(tmp_path, model)
    assert_same(cache, loaded)
    assert loaded.layers[1].recent.keys.dtype == loaded.layers[0].keys.dtype == dtype


def test_beams_crops_and_selections_are_saved_as_they_are(tmp_path):
    padding = [3, 0]
    ids, mask = prompt(padding=padding)
    model, cache = make("llama", left_padding=padding)
    logits = step(model, cache, ids, mask)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    cache.crop(-3)
    cache.batch_select_indices(torch.tensor([2, 0, 1]))  # three rows of a cache that was told of two
    logits, mask = logits.repeat_interleave(2, 0)[:3], mask.repeat_interleave(2, 0)[[2, 0, 1], :-3]
    cache.save_pretrained(tmp_path, model)
    loaded = TurboQuantCache.from_pretrained(tmp_path, model)
    assert_same(cache, loaded)
    assert torch.equal(greedy(model, cache, logits, mask)[1], greedy(model, loaded, logits, mask)[1])
    assert_same(cache, loaded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_goes_on_with_it(saved, copy, attention):
    _, model, _ = saved
    ids, mask = prompt(1, 41)
    model, cache = make("llama", key_bits=3)
    logits = step(model, cache, ids, mask)
    model.set_attn_implementation(attention)
    loaded = TurboQuantCache.from_pretrained(copy, model.config)
    expected, found = greedy(model, cache, logits, mask), greedy(model, loaded, logits, mask)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def test_generate_continues_a_loaded_cache(saved, copy):
    _, model, _ = saved
    ids, _ = prompt(1, 48)
    ids[:, :41] = prompt(1, 41)[0]
    fresh = TurboQuantCache(model.config, **SMALL, key_bits=3)
    step(model, fresh, ids[:, :41], torch.ones(1, 41, dtype=torch.long))
    loaded = TurboQuantCache.from_pretrained(copy, model)
    for beams in (1, 3):
        wide = [cache if beams == 1 else widened(cache, beams) for cache in (fresh, loaded)]
        arguments = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        expected, found = (model.generate(ids, past_key_values=cache, **arguments) for cache in wide)
        assert torch.equal(expected, found)
        fresh.crop(41 - fresh.get_seq_length())
        loaded.crop(41 - loaded.get_seq_length())


def widened(cache, beams):
    cache.batch_repeat_interleave(beams)
    return cache


def test_growth_reserve_is_not_saved(tmp_path):
    model, cache = make("llama")
    ids, mask = prompt(1)
    greedy(model, cache, step(model, cache, ids, mask), mask, tokens=60)
    assert cache.report().reserved > 0
    cache.save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    live = sum(tensor.nbytes for path, tensor in held(cache).items() if ".transform." not in path)
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == live


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("tokens"), st.integers(1, 30)),
            st.tuples(st.just("crop"), st.integers(1, 20)),
            st.tuples(st.just("rows"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        ),
        min_size=1,
        max_size=6,
    ),
    case=st.sampled_from(["llama", "llama 8 bit scales", "llama nothing kept"]),
    coded=st.booleans(),
)
def test_a_cache_of_any_history_is_saved_as_it_is(steps, case, coded, tmp_path_factory):
    coded and pytest.importorskip("constriction")
    model, cache = make(case)
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("history")
    for kind, amount in steps:
        if kind == "tokens":
            states = torch.randn(2, 3, 2, 2, amount, 8, generator=generator)
            for layer in range(3):
                cache.update(*states[:, layer], layer)
        elif kind == "crop":
            cache.crop(-amount)
        else:
            cache.reorder_cache(torch.tensor(amount))
    cache.save_pretrained(folder, entropy_coding=coded)
    loaded = TurboQuantCache.from_pretrained(folder, model)
    assert_same(cache, loaded)
    states = torch.randn(2, 3, 2, 2, 23, 8, generator=generator)
    for layer in range(3):
        for each in (cache, loaded):
            each.update(*states[:, layer], layer)
    assert_same(cache, loaded)


def test_an_empty_cache_is_saved_too(tmp_path):
    model, cache = make("gemma3")
    cache.save_pretrained(tmp_path)
    loaded = TurboQuantCache.from_pretrained(tmp_path, model)
    ids, mask = prompt()
    assert torch.equal(step(model, loaded, ids, mask), step(model, cache, ids, mask))


def test_layers_that_hold_something_else_are_refused_before_anything_is_written(tmp_path):
    class StrangeLayer(DynamicLayer):
        def __init__(self):
            super().__init__()
            self.indexer = object()

    model, cache = make("llama")
    cache.layers[1] = StrangeLayer()
    with pytest.raises(ValueError, match="StrangeLayer cannot be saved.*indexer"):
        cache.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What does not fit is refused, and the message says what differs.


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_key_value_heads": 1}, ["num_key_value_heads is 2 there and 1"]),
        ({"head_dim": 16}, ["head_dim is 8 there and 16"]),
        ({"num_hidden_layers": 2}, ["num_hidden_layers", "layer_types"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ["rope_parameters"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused(saved, fields, names):
    with pytest.raises(MemoryMismatchError) as error:
        TurboQuantCache.from_pretrained(saved[0], tiny_backbone("llama", **fields).config)
    assert all(name in str(error.value) for name in names)


def test_another_kind_of_model_is_refused(saved):
    with pytest.raises(MemoryMismatchError, match="model_type is 'llama' there and 'qwen3'"):
        TurboQuantCache.from_pretrained(saved[0], tiny_backbone("qwen3"))


def test_other_weights_are_refused_where_both_sides_know_them(saved, tmp_path):
    folder, model, cache = saved
    other = tiny_backbone("llama", seed=1)
    with pytest.raises(MemoryMismatchError, match="weights is '[0-9a-f]{16}' there and '[0-9a-f]{16}' in"):
        TurboQuantCache.from_pretrained(folder, other)
    with pytest.raises(MemoryMismatchError, match="dtype is 'float32' there and 'bfloat16' in"):
        TurboQuantCache.from_pretrained(folder, tiny_backbone("llama").to(torch.bfloat16))
    TurboQuantCache.from_pretrained(folder, other.config)
    cache.save_pretrained(tmp_path)  # without the model, so its weights are unknown
    TurboQuantCache.from_pretrained(tmp_path, other)
    with pytest.raises(MemoryMismatchError, match="head_dim"):
        cache.save_pretrained(tmp_path / "new", tiny_backbone("llama", head_dim=16))
    assert not (tmp_path / "new").exists()


def test_the_hash_of_weights_sees_one_weight_but_neither_dtype_nor_head():
    model = tiny_backbone("llama")
    digest = hash_decoder(model)
    model.lm_head.weight.data = model.lm_head.weight.data * 2
    assert hash_decoder(model.to(torch.bfloat16)) == digest
    model.model.layers[2].self_attn.k_proj.bias = None
    model.model.layers[2].self_attn.k_proj.weight.data[3, 5] += 1
    assert hash_decoder(model) != digest


def rewrite(folder, change):
    """Changes cache.json and signs it again, as a careful editor would."""
    index = json.loads((folder / "cache.json").read_text())
    index.pop("sha256")
    change(index)
    index["sha256"] = cache_files._digest(index)
    (folder / "cache.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format_version=2), "format_version must be 1.*got 2"),
        (lambda index: index.update(format="msa_hf memory"), "is not a file of the format 'msa_hf cache'"),
        (lambda index: index["settings"].update(key_bits=4), r"keys.0.codes must have shape .*, 4\); got"),
        (lambda index: index["settings"].update(key_bits=9), "key_bits must be"),
        (lambda index: index["settings"].update(rainbow=1), "unknown cache settings: rainbow"),
        (lambda index: index["settings"].update(dense_layers=[0]), "must be a DynamicLayer"),
        (lambda index: index["file"].update(name="../cache.safetensors"), "plain file names"),
        (lambda index: index["layers"][0].update(packed_length=28), r"must have shape \(1, 2, 28,"),
        (lambda index: index["layers"].pop(), "damaged|layers"),
        (lambda index: index.pop("settings"), "settings"),
        (lambda index: index.update(layers=3), "damaged"),
    ],
)
def test_an_edited_index_is_refused(saved, copy, change, message):
    rewrite(copy, lambda index: None)
    TurboQuantCache.from_pretrained(copy, saved[1])
    rewrite(copy, change)
    with pytest.raises(MemoryFormatError, match=message):
        TurboQuantCache.from_pretrained(copy, saved[1])


def test_settings_edited_without_signing_are_refused(saved, copy):
    text = (copy / "cache.json").read_text()
    (copy / "cache.json").write_text(text.replace('"window": 8', '"window": 9'))
    with pytest.raises(MemoryFormatError, match="its own SHA-256"):
        TurboQuantCache.from_pretrained(copy, saved[1])


# Damage.


def test_every_cut_is_noticed(saved, copy):
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for part in range(0, 40):
            path.write_bytes(whole[: len(whole) * part // 40])
            with pytest.raises(MemoryFormatError):
                TurboQuantCache.from_pretrained(copy, saved[1])
        path.write_bytes(whole + b" " if path.suffix == ".safetensors" else whole[:-1])
        with pytest.raises(MemoryFormatError):
            TurboQuantCache.from_pretrained(copy, saved[1])
        path.write_bytes(whole)
    assert_same(saved[2], TurboQuantCache.from_pretrained(copy, saved[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_noticed(saved, data, tmp_path_factory):
    folder, model, cache = saved
    copy = tmp_path_factory.mktemp("flipped")
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    for each in folder.iterdir():
        shutil.copy(each, copy)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (copy / path.name).write_bytes(content)
    try:
        loaded = TurboQuantCache.from_pretrained(copy, model.config)
    except (MemoryFormatError, MemoryMismatchError):
        return
    # Only white space between JSON's words may differ.
    assert path.suffix == ".json" and json.loads(content) == json.loads(path.read_text())
    assert_same(cache, loaded)


def test_missing_files_are_named(saved, copy):
    [tensors] = copy.glob("*.safetensors")
    tensors.unlink()
    with pytest.raises(MemoryFormatError, match="missing or cut off"):
        TurboQuantCache.from_pretrained(copy, saved[1])
    (copy / "cache.json").unlink()
    with pytest.raises(FileNotFoundError, match="cache.json is missing"):
        TurboQuantCache.from_pretrained(copy, saved[1])
    saved[1].config.save_pretrained(copy)
    (copy / "cache.json").write_text("[1, 2]")
    with pytest.raises(MemoryFormatError, match="is not a file of the format 'msa_hf cache'"):
        TurboQuantCache.from_pretrained(copy, saved[1])


def test_tensors_of_another_cache_are_refused(saved, copy, tmp_path):
    model, cache = make("llama", key_bits=3)
    ids, mask = prompt(1, 41)
    step(model, cache, ids.flip(1), mask)
    cache.save_pretrained(tmp_path / "other", model)
    [own], [other] = copy.glob("*.safetensors"), (tmp_path / "other").glob("*.safetensors")
    assert own.stat().st_size == other.stat().st_size
    shutil.copy(other, own)
    with pytest.raises(MemoryFormatError, match="SHA-256"):
        TurboQuantCache.from_pretrained(copy, model)


# Killed at any moment.


def test_a_save_that_is_killed_leaves_the_old_cache_whole(saved, copy, monkeypatch, tmp_path):
    """The disk as it is before and after every step of a save is a disk after kill -9 there."""
    _, model, old = saved
    new = TurboQuantCache(model.config, **SMALL)
    step(model, new, *prompt(1, 23))
    disks = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args, **kwargs):
            for call in (None, original):
                result = call and call(*args, **kwargs)
                disks.append(tmp_path / f"disk{len(disks)}")
                shutil.copytree(copy, disks[-1])
            return result

        monkeypatch.setattr(module, name, watched)

    watch(memory_files, "save_file")
    watch(memory_files.os, "fsync")
    watch(memory_files.os, "replace")
    watch(cache_files.Path, "unlink")
    new.save_pretrained(copy, model)
    monkeypatch.undo()
    assert len(disks) == 10  # the file, two times fsync, the replacement, one stale file
    lengths = []
    for disk in disks:
        for part in disk.glob("*"):  # a file that was being written may end anywhere
            if part.name not in {path.name for path in (*saved[0].iterdir(), *copy.iterdir())}:
                part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        loaded = TurboQuantCache.from_pretrained(disk, model)
        lengths.append(loaded.get_seq_length())
        assert_same(old if lengths[-1] == 41 else new, loaded)
        new.save_pretrained(disk, model)
        assert len(list(disk.iterdir())) == 2, "leftovers of the killed save are removed by the next"
    assert lengths == sorted(lengths, reverse=True) and set(lengths) == {41, 23}


@pytest.mark.parametrize("module, name", [(memory_files, "save_file"), (memory_files.os, "replace")])
def test_a_save_that_fails_leaves_the_old_cache_and_no_litter(saved, copy, monkeypatch, module, name):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    original = getattr(module, name)

    def fails(*args, **kwargs):
        if name == "save_file":
            original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(KeyboardInterrupt):
        saved[2].save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_interrupt_right_after_the_replacement_keeps_the_new_cache(saved, copy, monkeypatch):
    original = memory_files.os.replace

    def late(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_files.os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        saved[2].save_pretrained(copy)
    monkeypatch.undo()
    assert_same(saved[2], TurboQuantCache.from_pretrained(copy, saved[1]))


def test_files_of_others_in_the_folder_stay(saved, copy):
    (copy / "cache-notes.safetensors").write_bytes(b"mine")
    saved[1].config.save_pretrained(copy)
    saved[2].save_pretrained(copy)
    assert (copy / "cache-notes.safetensors").read_bytes() == b"mine"
    assert isinstance(PreTrainedConfig.from_pretrained(copy), PreTrainedConfig)


# Entropy coding.


def test_entropy_coding_gets_near_the_entropy_and_says_what_it_saves(tmp_path):
    pytest.importorskip("constriction")
    model, _ = make("llama", key_bits=4)
    cache = TurboQuantCache(model.config, key_bits=4, value_bits=2)
    for layer in range(3):
        states = torch.randn(2, 1, 2, 4000, 8, generator=torch.Generator().manual_seed(layer))
        cache.update(states[0], states[1], layer)
    plain = cache.save_pretrained(tmp_path / "plain")
    coded = cache.save_pretrained(tmp_path / "coded", entropy_coding=True)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("plain", "coded")]
    assert [plain.bytes, coded.bytes] == sizes and plain.bytes_saved == 0
    assert abs(coded.bytes_uncoded - plain.bytes) < 0.01 * plain.bytes
    assert_same(cache, TurboQuantCache.from_pretrained(tmp_path / "coded", model))
    # The entropy of what was coded, counted symbol by symbol over each kind of code.
    tensors = load_file(next((tmp_path / "coded").glob("*.safetensors")))
    for kind, bits in (("keys", 4), ("values", 2)):
        parts = [getattr(layer, f"packed_{kind}")[0] for layer in cache.layers]
        codes = torch.stack([part.codes.view() for part in parts])
        share = unpack(codes, bits, 8).flatten().bincount() / (codes.numel() * 8 / bits)
        entropy = -(share * share.log2()).sum() * codes.numel() / bits
        written = sum(tensors[f"layers.{layer}.{kind}.0.codes"].numel() for layer in range(3))
        assert written < 1.01 * entropy < codes.numel()


def test_entropy_coding_without_constriction_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="pip install constriction"):
        saved[2].save_pretrained(tmp_path / "new", entropy_coding=True)
    assert not (tmp_path / "new").exists()


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 40)),
    parts=st.lists(st.tuples(st.integers(1, 19), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=3),
    skew=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_entropy_coding_is_exact(shape, parts, skew, seed):
    pytest.importorskip("constriction")
    generator = torch.Generator().manual_seed(seed)
    size = sum(width if bits == 8 else packed_bytes(width, bits) for width, bits in parts)
    tensor = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    tensor[torch.rand(tensor.shape, generator=generator) < skew] = seed % 256
    for start, bits in unused_bits(parts):  # a last byte that codes do not fill ends in zeros
        tensor[..., start] &= (1 << bits) - 1
    coded, tables = encode_streams({"a": (tensor, parts), "empty": (tensor[:, :, :0], parts)})
    assert "empty" not in coded
    if "a" in coded:
        assert coded["a"].numel() < tensor.numel()
        assert torch.equal(decode_stream(coded["a"], tables, tuple(tensor.shape), parts), tensor)
    else:
        assert skew < 0.95 or tensor.numel() < 2000


def unused_bits(parts):
    """(byte, bits in use) of the last byte of each part."""
    start = 0
    for width, bits in parts:
        start += width if bits == 8 else packed_bytes(width, bits)
        if rest := width * bits % 8:
            yield start - 1, rest
