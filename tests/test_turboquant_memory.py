"""A TurboQuantCache under a model with memory: chosen by name in generate(), and below the memory prefix."""

import pytest
import torch
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model

from msa_hf.modeling.cache_turboquant import TurboQuantCache

SMALL = {"key_bits": 3, "value_bits": 2, "window": 4, "block": 4, "mean_group": 8, "sinks": 1, "extremes": 1}
QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "turboquant", **SMALL}}
MODES = [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prefill_chunk_size": 5}]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def bank(model, tiny_tokenizer):
    return model.encode_memory(DOCUMENTS, tiny_tokenizer)


@pytest.fixture
def batch(tiny_tokenizer):
    return tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)


def answer(model, batch, **options):
    return model.generate(**batch, max_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("reads", [False, True], ids=["plain", "memory"])
def test_codes_give_the_tokens_of_decoded_eager_attention(model, bank, batch, mode, reads):
    if reads:
        mode = {**mode, "memory": bank, "retrieval": "attention"}
    expected = {}
    for implementation in ("eager", "sdpa", "turboquant"):
        model.set_attn_implementation(implementation)
        expected[implementation] = answer(model, batch, **QUANTIZED, **mode)
    model.set_attn_implementation("sdpa")
    assert torch.equal(expected["sdpa"], expected["eager"])
    assert torch.equal(expected["turboquant"], expected["eager"])


@pytest.mark.parametrize("reads", [False, True], ids=["plain", "memory"])
def test_a_window_that_holds_everything_changes_nothing(model, bank, batch, reads):
    memory = {"memory": bank, "retrieval": "attention"} if reads else {}
    wide = {"cache_implementation": "quantized", "cache_config": {"backend": "turboquant", "window": 512}}
    assert torch.equal(answer(model, batch, **wide, **memory), answer(model, batch, **memory))


def test_by_name_is_the_same_as_by_object(model, bank, batch):
    padding = batch["attention_mask"]
    for memory in ({}, {"memory": bank, "retrieval": "attention"}):
        cache = TurboQuantCache(model.config, left_padding=None if memory else padding, **SMALL)
        by_object = answer(model, batch, past_key_values=cache, **memory)
        assert all(layer.packed_length > 0 for layer in cache.packed_layers)
        assert torch.equal(answer(model, batch, **QUANTIZED, **memory), by_object)


def test_interleave_answers_through_a_quantised_cache(model, bank, batch, tiny_tokenizer):
    options = {"memory": bank, "retrieval": "router", "tokenizer": tiny_tokenizer}
    exact = {"cache_implementation": "quantized", "cache_config": {"backend": "turboquant", "window": 512}}
    assert torch.equal(answer(model, batch, **options, **exact), answer(model, batch, **options))


def test_default_of_the_generation_config(model, batch):
    expected = answer(model, batch, **QUANTIZED)
    before = model.generation_config.cache_implementation, model.generation_config.cache_config
    model.generation_config.cache_implementation = "quantized"
    model.generation_config.cache_config = QUANTIZED["cache_config"]
    try:
        assert torch.equal(answer(model, batch), expected)
    finally:
        model.generation_config.cache_implementation, model.generation_config.cache_config = before


def test_two_caches_at_once_are_refused(model, bank, batch):
    for memory in ({}, {"memory": bank, "retrieval": "attention"}):
        with pytest.raises(ValueError, match="cache_implementation"):
            answer(model, batch, past_key_values=TurboQuantCache(model.config), **QUANTIZED, **memory)


@pytest.mark.parametrize(
    ("field", "value"), [("key_bits", 7), ("window", -1), ("preset", "5bit"), ("nonsense", 1)]
)
def test_bad_cache_config_names_the_field(model, batch, field, value):
    config = {"cache_implementation": "quantized", "cache_config": {"backend": "turboquant", field: value}}
    with pytest.raises(ValueError, match=field):
        answer(model, batch, **config)


def test_padding_longer_than_what_is_packed_leaves_no_exact_token(model, batch):
    padded = {"left_padding": [40, 40], **SMALL}
    ids = torch.randint(3, 259, (2, 44), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(44) >= 40).long().expand(2, -1)
    outputs = {}
    for implementation in ("eager", "turboquant"):
        model.set_attn_implementation(implementation)
        cache = TurboQuantCache(model.config, **padded)
        model(ids, attention_mask=torch.ones_like(mask), past_key_values=cache)
        assert (cache.layers[0].exact.positions < 0).all()
        outputs[implementation] = model(ids[:, :1], past_key_values=cache).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(outputs["turboquant"], outputs["eager"], rtol=1e-4, atol=1e-4)
