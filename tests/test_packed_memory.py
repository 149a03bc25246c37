"""Packed banks: the storage against the quantiser, and a bank against a dense one of the decoded vectors."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, rms_ratio
from safetensors.torch import load_file, save_file
from test_kernel_dispatch import count_calls
from tiny_models import DOCUMENTS, MEMORY, QUESTIONS, tiny_model

from msa_hf import MemoryBank
from msa_hf.modeling import ops, packed_vectors
from msa_hf.modeling.codebooks import distortion
from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError
from msa_hf.modeling.memory_bank import DenseVectors, LayerMemory
from msa_hf.modeling.memory_files import NAMES
from msa_hf.modeling.packed_vectors import PackedRows, RowCoder, RowPacking
from msa_hf.modeling.turboquant import Transform, VectorQuantizer, dequantize, quantize

WIDTHS = (1, 2, 3, 4)
HEADS, DIM = 3, 16
HALF_PRECISION = 2e-3  # kernels read queries, centroids and matrices in about 11 bits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def bank(model, tiny_tokenizer):
    return model.encode_memory(DOCUMENTS, tiny_tokenizer)


def rows_like_keys(count: int, seed: int = 0) -> torch.Tensor:
    """[C, W] whose heads differ in size and lie around a mean."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.1, 1.0, 30.0])[:, None]
    means = torch.randn(HEADS, DIM, generator=generator)
    return ((torch.randn(count, HEADS, DIM, generator=generator) + 2 * means) * size).flatten(1)


def packed(vectors: torch.Tensor, **fields) -> PackedRows:
    return PackedRows.code(vectors, RowCoder.fit(vectors, HEADS, RowPacking(**fields)))


def decoded(bank: MemoryBank) -> MemoryBank:
    """The dense bank that holds what a packed one is read as."""
    layers = {
        layer: LayerMemory(
            **{
                name: DenseVectors(getattr(memory, name).slice(0, len(getattr(memory, name))).clone())
                for name in NAMES
            }
        )
        for layer, memory in bank.layers.items()
    }
    return replace(bank, layers=layers)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_bits", (8, 16))
@pytest.mark.parametrize("centered", (False, True))
def test_rows_are_those_of_the_quantiser(bits, scale_bits, centered, monkeypatch):
    monkeypatch.setattr(packed_vectors, "TILE_ELEMENTS", 7 * HEADS * DIM)
    vectors = rows_like_keys(50)
    storage = packed(vectors, bits=bits, scale_bits=scale_bits, centered=centered, seed=3)
    quantizer = VectorQuantizer(((DIM, bits),), "unbiased", scale_bits)
    rotation = Transform.rotation("hadamard", (DIM,), 3)
    for head, own in enumerate(vectors.unflatten(1, (HEADS, DIM)).unbind(1)):
        mean = own.double().mean(0).float() if centered else torch.zeros(DIM)
        gain = (own - mean).square().mean(1).median().sqrt().log2().round().exp2() if scale_bits == 8 else 1.0
        codes = quantize((own.double() - mean) / gain, quantizer, rotation)
        assert torch.equal(storage.packed.codes[:, head], codes.codes)
        assert torch.equal(storage.packed.scales[:, head], codes.scales)
        torch.testing.assert_close(
            storage.slice(0, 50)[:, head * DIM : (head + 1) * DIM], dequantize(codes, rotation) * gain + mean
        )
    assert (len(storage), storage.width, storage.dtype) == (50, HEADS * DIM, torch.float32)
    extra = HEADS * DIM * 4 * centered + HEADS * 4 * (scale_bits == 8)
    assert storage.nbytes == 50 * HEADS * (DIM * bits // 8 + scale_bits // 8) + extra


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_is_that_of_the_codebook(bits):
    """With unbiased scales D / (1 - D); an offset of all rows adds nothing to it, however long."""
    states = torch.randn(4000, 1, 64, generator=torch.Generator().manual_seed(0)).flatten(1)
    expected = distortion(64, bits) / (1 - distortion(64, bits))
    for offset in (0.0, 100.0):
        vectors = states + offset
        own = PackedRows.code(vectors, RowCoder.fit(vectors, 1, RowPacking(bits)))
        error = (own.slice(0, 4000) - vectors).square().sum() / states.square().sum()
        assert float(error) == pytest.approx(expected, rel=0.04)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    scale_bits=st.sampled_from((8, 16)),
    chosen=st.lists(st.integers(0, 19), max_size=12),
    bounds=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_slice_take_and_write_agree(bits, scale_bits, chosen, bounds, dtype):
    vectors = rows_like_keys(20).to(dtype)
    storage = packed(vectors, bits=bits, scale_bits=scale_bits)
    everything, start, stop = storage.slice(0, 20), min(bounds), max(bounds)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    assert everything.dtype == dtype
    torch.testing.assert_close(storage.slice(start, stop), everything[start:stop], **tolerance)
    torch.testing.assert_close(storage.take(torch.tensor(chosen).long()), everything[chosen], **tolerance)
    query = torch.randn(DIM, generator=torch.Generator().manual_seed(bits))
    products, expected = (
        rows.unflatten(1, (HEADS, DIM)).float() @ own
        for rows, own in ((storage.rotated_slice(start, stop), storage.rotate(query)), (everything, query))
    )
    assert rms_ratio(products, expected[start:stop]) < 8 * torch.finfo(dtype).eps
    again = PackedRows.allocate(20, storage.coder, dtype)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(len(chosen)))
    for part in order.split(7):
        again.write(part, vectors[part])
    assert torch.equal(again.packed.codes, storage.packed.codes)
    assert torch.equal(again.packed.scales, storage.packed.scales)


def test_moving_leaves_every_bit_and_the_original():
    storage = packed(rows_like_keys(9), bits=3, scale_bits=8)
    moved = storage.to(DEVICE)
    assert moved.device.type == DEVICE.type and storage.device.type == "cpu"
    for name, tensor in storage.tensors().items():
        assert torch.equal(moved.tensors()[name].cpu(), tensor)


def test_storage_without_rows():
    storage = packed(torch.zeros(0, HEADS * DIM), bits=2, scale_bits=8)
    assert storage.slice(0, 0).shape == storage.take(torch.tensor([]).long()).shape == (0, HEADS * DIM)
    assert len(storage) == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ("llama", "qwen3"))
@pytest.mark.parametrize("query_reduction", ("max", "maxsim"))
def test_a_packed_bank_is_the_dense_bank_of_its_decoded_vectors(bits, kind, query_reduction, tiny_tokenizer):
    model = tiny_model(kind, query_reduction=query_reduction)
    own = model.encode_memory(DOCUMENTS, tiny_tokenizer).pack(bits, bits, bits)
    twin = decoded(own)
    scores, expected = (model.route_questions(QUESTIONS, b, tokenizer=tiny_tokenizer) for b in (own, twin))
    chosen = [torch.tensor([6, 2, 0]), torch.tensor([4])]
    for layer in MEMORY["router_layers"]:
        torch.testing.assert_close(scores[layer], expected[layer], atol=1e-5, rtol=1e-5)
        for ours, wanted in zip(own.gather(layer, chosen), twin.gather(layer, chosen)):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    for retrieval in ("attention", "router"):
        ours, wanted = (
            model.generate(**batch, memory=b, retrieval=retrieval, max_new_tokens=8, do_sample=False)
            for b in (own, twin)
        )
        assert torch.equal(ours, wanted)


def test_routing_streams_over_tiles_of_documents(model, bank, tiny_tokenizer, monkeypatch):
    own = bank.pack(router_bits=3)
    expected = model.route_questions(QUESTIONS, own, tokenizer=tiny_tokenizer)
    monkeypatch.setattr(packed_vectors, "TILE_ELEMENTS", 1)
    read, original = [], PackedRows.rotated_slice

    def counted(self, start, stop):
        read.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(PackedRows, "rotated_slice", counted)
    scores = model.route_questions(QUESTIONS, own, tokenizer=tiny_tokenizer)
    assert max(read) == int(bank.router_chunk_counts.max())  # never more than one document
    for layer in MEMORY["router_layers"]:
        torch.testing.assert_close(scores[layer], expected[layer], atol=1e-5, rtol=1e-5)


def test_four_bits_stay_close_and_none_stays_dense(model, bank, tiny_tokenizer):
    own = bank.pack()
    for layer, memory in bank.layers.items():
        for name in NAMES:
            dense, coded = getattr(memory, name), getattr(own.layers[layer], name)
            assert rms_ratio(coded.slice(0, len(coded)), dense.data) < 0.15
    kept = bank.pack(key_bits=None, value_bits=2, router_bits=None)
    layer = MEMORY["router_layers"][0]
    assert kept.layers[layer].keys is bank.layers[layer].keys
    assert isinstance(bank.layers[layer].values, DenseVectors)  # the bank itself has not changed
    batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    with torch.no_grad():
        ours, wanted = (model(**batch, memory=b, use_cache=False) for b in (kept, bank))
    for mine, theirs in zip(ours.selected_documents[layer], wanted.selected_documents[layer]):
        assert torch.equal(mine, theirs)
    assert not torch.equal(ours.logits, wanted.logits)


def test_stats_count_the_tensors_held(bank):
    own, layers = bank.pack(4, 3, 2), len(MEMORY["router_layers"])
    stats, chunks, routers = own.stats(), int(bank.chunk_counts.sum()), int(bank.router_chunk_counts.sum())
    heads, dim = 2, 8
    router_bytes = layers * routers * heads * (dim * 2 // 8 + 2)
    vectors = layers * (chunks * heads * (dim * 4 // 8 + 2 + dim * 3 // 8 + 2) + 2 * heads * dim * 4)
    assert stats["router_key_bytes"] == router_bytes
    assert stats["vector_bytes"] == vectors + router_bytes
    assert [stats[f"{name}_bits"] for name in NAMES] == [4, 3, 2]
    assert [bank.stats()[f"{name}_bits"] for name in NAMES] == [None] * 3


@pytest.mark.parametrize("documents", ([], ["", ""], ["x"], ["", "a fact"]))
def test_small_memories(model, documents, tiny_tokenizer, tmp_path):
    own = model.encode_memory(documents, tiny_tokenizer).pack(2, 2, 2)
    own.save_pretrained(tmp_path)
    batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    for memory in (own, MemoryBank.from_pretrained(tmp_path, model=model)):
        with torch.no_grad():
            output = model(**batch, memory=memory, use_cache=False)
        for layer in MEMORY["router_layers"]:
            for ids in output.selected_documents[layer]:
                assert sorted(ids.tolist()) == [i for i, text in enumerate(documents) if text]
        assert output.logits.isfinite().all()


@pytest.mark.parametrize("bits", ((1, 2, 3), (None, 4, None), (4, None, 4)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_saved_packed_memory_is_the_same_memory(bits, dtype, tiny_tokenizer, tmp_path):
    model = tiny_model(dtype=dtype)
    own = model.encode_memory(DOCUMENTS, tiny_tokenizer).pack(*bits)
    own.save_pretrained(tmp_path)
    again = MemoryBank.from_pretrained(tmp_path, model=model)
    assert again.stats() == own.stats()
    for layer, memory in own.layers.items():
        for name in NAMES:
            stored, loaded = getattr(memory, name), getattr(again.layers[layer], name)
            assert type(stored) is type(loaded) and stored.dtype == loaded.dtype
            assert stored.tensors().keys() == loaded.tensors().keys()
            for end, tensor in stored.tensors().items():
                assert torch.equal(tensor, loaded.tensors()[end])
            assert torch.equal(stored.slice(0, len(stored)), loaded.slice(0, len(loaded)))
    assert json.loads((tmp_path / "memory.json").read_text())["format_version"] == 2
    with pytest.raises(MemoryMismatchError, match="backbone"):
        MemoryBank.from_pretrained(tmp_path, model=tiny_model(seed=5))


def test_a_dense_memory_keeps_the_first_format_version(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "memory.json").read_text())
    assert index["format_version"] == 1 and "packing" not in index


LAYER = f"layers.{MEMORY['router_layers'][0]}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    (
        ("bits", 5, "bits must be 1, 2, 3 or 4; got 5"),
        ("bits", 4.0, "bits must be 1, 2, 3 or 4; got 4.0"),
        ("bits", 3, "codes must be torch.uint8 of shape"),
        ("bits", True, "bits must be"),
        ("centered", False, "means must be None"),
        ("centered", 1, "centered must be true or false; got 1"),
        ("scale_bits", 8, "gains must be given"),
        ("scale_bits", 9, "scale_bits must be 8 or 16; got 9"),
        ("scale_rule", "largest", "scale_rule must be one of"),
        ("seed", -1, "seed must be a whole number of at least 0; got -1"),
        ("seed", "0", "seed must be"),
        ("dtype", "int8", "dtype must be one of"),
        ("dtype", [], "damaged"),
        ("kind", "new", "packing must have the fields"),
    ),
)
def test_damaged_settings_are_refused(bank, tmp_path, field, value, message):
    bank.pack().save_pretrained(tmp_path)
    path = tmp_path / "memory.json"
    index = json.loads(path.read_text())
    index["packing"][f"{LAYER}.keys"][field] = value
    path.write_text(json.dumps(index))
    with pytest.raises(MemoryFormatError, match=message):
        MemoryBank.from_pretrained(tmp_path)


def test_packing_of_something_else_is_refused(bank, tmp_path):
    bank.pack().save_pretrained(tmp_path)
    path = tmp_path / "memory.json"
    index = json.loads(path.read_text())
    packing = index["packing"]
    missing = {name: own for name, own in packing.items() if name != f"{LAYER}.keys"}
    for changed in (None, [], {**packing, "layers.99.keys": packing[f"{LAYER}.keys"]}, missing):
        path.write_text(json.dumps({**index, "packing": changed}))
        with pytest.raises(MemoryFormatError):
            MemoryBank.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    (
        ("codes", lambda tensor: tensor[1:]),
        ("scales", lambda tensor: tensor.float()),
        ("means", lambda tensor: tensor * torch.nan),
        ("means", lambda tensor: tensor[:1]),
        ("codes", None),
    ),
)
def test_tensors_that_do_not_fit_are_refused(bank, tmp_path, name, change):
    bank.pack().save_pretrained(tmp_path)
    file = next(tmp_path.glob("vectors-*"))
    tensors = load_file(file)
    changed = tensors.pop(f"{LAYER}.keys.{name}")
    if change is not None:
        tensors[f"{LAYER}.keys.{name}"] = change(changed).contiguous()
    save_file(tensors, file)
    path = tmp_path / "memory.json"
    index = json.loads(path.read_text())
    index["files"]["vectors"]["bytes"] = file.stat().st_size
    path.write_text(json.dumps(index))
    with pytest.raises(MemoryFormatError, match=f"{name}"):
        MemoryBank.from_pretrained(tmp_path)


def test_bad_arguments_are_refused(bank):
    for bits in (0, 5, 2.0, "4"):
        with pytest.raises(ValueError, match=f"bits must be 1, 2, 3 or 4; got {bits!r}"):
            bank.pack(router_bits=bits)
    with pytest.raises(ValueError, match="keys must be dense to be packed; layer 1 has them in 4 bits"):
        bank.pack().pack(key_bits=2, value_bits=None, router_bits=None)
    with pytest.raises(ValueError, match="heads must divide the width 48; got 5"):
        RowCoder.fit(torch.zeros(4, 48), 5, RowPacking(4))
    with pytest.raises(ValueError, match="gains must be positive"):
        RowCoder(RowPacking(4, centered=False, scale_bits=8), 1, 8, gains=torch.zeros(1))
    storage = packed(rows_like_keys(3), bits=2)
    with pytest.raises(ValueError, match="finite"):
        storage.write(torch.tensor([0]), torch.full((1, HEADS * DIM), torch.nan))


@pytest.fixture
def with_kernels():
    ops.use_kernels(True)
    yield
    ops.use_kernels(None)


@pytest.mark.parametrize("bits", ((4, 4, 4), (2, 3, 1)))
def test_kernels_read_codes(bits, monkeypatch, tiny_tokenizer, with_kernels):
    model = tiny_model("qwen3", head_dim=16).to(DEVICE)
    ops.use_kernels(False)
    own = model.encode_memory(DOCUMENTS, tiny_tokenizer).pack(*bits)
    batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True).to(DEVICE)
    chosen = [torch.tensor([6, 2, 0], device=DEVICE), torch.tensor([4], device=DEVICE)]
    layer = MEMORY["router_layers"][0]
    options = {"retrieval": "attention", "max_new_tokens": 4, "do_sample": False}

    def results():
        scores = model.route_questions(QUESTIONS, own, tokenizer=tiny_tokenizer)[layer]
        return scores, own.gather(layer, chosen), model.generate(**batch, memory=own, **options)

    scores, prefix, tokens = results()
    ops.use_kernels(True)
    calls = count_calls(monkeypatch, "route_scores", "gather_packed", "gather_dense")
    kernel_scores, kernel_prefix, kernel_tokens = results()
    assert ops.backend(DEVICE)[0] == "triton", ops.backend(DEVICE)
    assert calls["route_scores"] and calls["gather_packed"] and not calls["gather_dense"]
    real = scores > -torch.inf
    assert torch.equal(real, kernel_scores > -torch.inf)
    assert rms_ratio(kernel_scores[real], scores[real]) < HALF_PRECISION
    for ours, wanted in zip(kernel_prefix, prefix):
        assert rms_ratio(ours, wanted) < HALF_PRECISION
    assert torch.equal(kernel_tokens, tokens)


def test_gains_and_means_reach_the_kernels(monkeypatch, with_kernels):
    vectors = [rows_like_keys(21, seed).to(DEVICE) for seed in (0, 1)]
    keys, values = packed(vectors[0], bits=4, scale_bits=8), packed(vectors[1], bits=3)
    routers = packed(vectors[0], bits=2, scale_bits=8, centered=False)
    rows = torch.tensor([[3, 0, 20], [5, -1, -1]], device=DEVICE)
    queries = torch.randn(2, 2 * HEADS, 5, DIM, device=DEVICE)
    mask, counts = torch.ones(2, 5, dtype=torch.bool, device=DEVICE), torch.tensor([9, 0, 12])

    def results():
        prefix = ops.memory_prefix(keys, values, rows, HEADS)
        return *prefix, ops.document_scores(queries, mask, routers, counts)

    calls = count_calls(monkeypatch, "route_scores", "gather_packed")
    ours = results()
    assert calls == {"route_scores": 1, "gather_packed": 1}
    ops.document_scores(queries, mask, keys, counts)  # no kernel adds a mean before the maximum over tokens
    assert calls["route_scores"] == 1
    ops.use_kernels(False)
    for mine, own in zip(ours, results()):
        real = own > -torch.inf
        assert rms_ratio(mine[real], own[real]) < HALF_PRECISION
    assert not ours[0][1, :, 1:].any()


def test_a_document_has_the_same_bytes_in_every_bank(tiny_tokenizer, tmp_path):
    model = tiny_model()
    whole = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    alone = model.encode_memory(DOCUMENTS[3:4], tiny_tokenizer)
    alone.save_pretrained(tmp_path)
    first = int(whole.chunk_counts[:3].sum())
    for bank in (alone.pack(), MemoryBank.from_pretrained(tmp_path).pack()):
        for layer, memory in whole.pack().layers.items():
            own = bank.layers[layer].keys.packed
            assert torch.equal(own.codes, memory.keys.packed.codes[first : first + len(own.codes)])
            assert torch.equal(own.scales, memory.keys.packed.scales[first : first + len(own.scales)])


def test_without_typical_means_a_bank_takes_its_own(tiny_tokenizer):
    bank = tiny_model().encode_memory(DOCUMENTS, tiny_tokenizer)
    bank.means = {}  # as in a bank of an older release
    packed = bank.pack().layers[1].keys
    own = bank.layers[1].keys.data.unflatten(1, packed.coder.means.shape).double().mean(0).float()
    assert torch.equal(packed.coder.means, own)
