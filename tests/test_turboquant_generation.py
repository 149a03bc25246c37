"""Every way to generate with a TurboQuantCache: the very tokens of a naive twin under eager attention."""

import copy

import pytest
import torch
from backbones import CACHE_BACKBONES, cache_backbone
from cache_twin import TwinCache
from transformers import DynamicCache, set_seed

from msa_hf.modeling.cache_settings import CacheSettings
from msa_hf.modeling.cache_turboquant import TurboQuantCache

NEW = 12
SMALL = {"window": 8, "block": 4, "mean_group": 16, "sinks": 2, "extremes": 2, "code_search": 2}
PADDING = [0, 13]


@pytest.fixture(scope="module", params=CACHE_BACKBONES)
def model(request):
    return cache_backbone(request.param)


@pytest.fixture(scope="module")
def llama():
    return cache_backbone("llama")


def prompts(rows=2, tokens=45, padding=None, seed=0):
    """Random prompts whose parts repeat, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, tokens // 3), generator=generator).repeat(1, 3)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding or []):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def packed(model, padding=None, **changes):
    return TurboQuantCache(model.config, left_padding=padding, **{**SMALL, **changes})


def twin(model, padding=None, **changes):
    return TwinCache(model.config, CacheSettings(**{**SMALL, **changes}), padding)


def run(model, implementation, cache, inputs, **options):
    model.set_attn_implementation(implementation)
    set_seed(5)
    return model.generate(
        **inputs, past_key_values=cache, **{"max_new_tokens": NEW, "do_sample": False, **options}
    )


def check(model, inputs, padding=None, settings=None, **options):
    """Generates with the cache and with its twin; returns the tokens and both caches."""
    cache, naive = packed(model, padding, **(settings or {})), twin(model, padding, **(settings or {}))
    tokens = run(model, "turboquant", cache, inputs, **options)
    assert all(layer.packed_length >= 24 for layer in cache.packed_layers)
    assert torch.equal(tokens, run(model, "eager", naive, inputs, **options))
    return tokens, cache, naive


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_left_padding(model, mode):
    check(model, prompts(padding=PADDING), PADDING, **MODES[mode])


def test_prompt_lookup(model):
    tokens, cache, _ = check(model, prompts(rows=1), prompt_lookup_num_tokens=4)
    # The last token has not been read, and every rejected candidate is gone.
    assert cache.get_seq_length() == tokens.shape[1] - 1


def assistant_of(model):
    """The same model with other logits, so that some of its candidates are right."""
    assistant = copy.deepcopy(model)
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    assistant.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1 * noise)
    assistant.set_attn_implementation("eager")
    return assistant


def test_assisted_decoding(model):
    tokens, cache, _ = check(model, prompts(rows=1), assistant_model=assistant_of(model))
    assert cache.get_seq_length() == tokens.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_candidates_change_nothing_while_no_block_fills(name):
    """32 tokens are packed before the first new one and 48 only after the last: greedy, exactly."""
    model, inputs = cache_backbone(name), prompts(rows=1, tokens=42)
    settings = {"block": 16}
    greedy = run(model, "turboquant", packed(model, **settings), inputs, max_new_tokens=8)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant_of(model)}):
        tokens, cache, _ = check(model, inputs, settings=settings, max_new_tokens=8, **options)
        assert torch.equal(tokens, greedy)
        assert {layer.packed_length for layer in cache.packed_layers} == {32}


def test_a_kept_cache_continues_the_conversation(model):
    """Three turns in one cache, the second in chunks; padding only before the first."""
    inputs = prompts(padding=PADDING)
    caches = {"turboquant": packed(model, PADDING), "eager": twin(model, PADDING)}
    for turn, options in enumerate([{}, {"prefill_chunk_size": 5}, {"do_sample": True}]):
        outputs = [run(model, name, cache, inputs, **options) for name, cache in caches.items()]
        assert torch.equal(*outputs)
        ids = torch.cat([outputs[0], prompts(tokens=18, seed=turn + 1)["input_ids"]], dim=1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        inputs = {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def prefilled(model, implementation, cache, inputs):
    model.set_attn_implementation(implementation)
    model(**inputs, past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_one_prefix_serves_many_questions(name):
    """Deep copies, a widened cache and a cropped one all answer as a cache that read everything."""
    model, prefix = cache_backbone(name), prompts(rows=1)
    questions = prompts(rows=3, tokens=12, seed=7)["input_ids"]
    both = torch.cat([prefix["input_ids"].expand(3, -1), questions], dim=1)
    wide = {"input_ids": both, "attention_mask": torch.ones_like(both)}
    answers = {}
    for implementation, make in (("turboquant", packed), ("eager", twin)):
        kept = prefilled(model, implementation, make(model), prefix)
        copied = [
            run(model, implementation, copy.deepcopy(kept), {k: v[i : i + 1] for k, v in wide.items()})
            for i in range(3)
        ]
        kept.batch_repeat_interleave(3)
        answers[implementation] = run(model, implementation, kept, wide)
        assert torch.equal(torch.cat(copied), answers[implementation])
        kept.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(answers["turboquant"], answers["eager"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("back", [3, 12, 21])
def test_crop_back_and_go_on(name, back):
    """Back within the window, into packed tokens (14 are dense), and far into them."""
    model, prefix = cache_backbone(name), prompts(padding=PADDING)
    question = prompts(tokens=12, seed=7)["input_ids"]
    outputs = []
    for implementation, make in (("turboquant", packed), ("eager", twin)):
        cache = make(model, PADDING, block=8, mean_group=8)
        cache.activate_past_recording()
        prefilled(model, implementation, cache, prefix)
        cache.crop(-back)
        ids = torch.cat([prefix["input_ids"][:, :-back], question], dim=1)
        mask = torch.cat([prefix["attention_mask"][:, :-back], torch.ones_like(question)], dim=1)
        outputs.append(run(model, implementation, cache, {"input_ids": ids, "attention_mask": mask}))
    assert torch.equal(*outputs)


def test_beams_on_a_kept_cache(llama):
    """generate() widens its inputs, not the cache: the user does, with batch_repeat_interleave."""
    prefix = prompts(padding=PADDING)
    ids = torch.cat([prefix["input_ids"], prompts(tokens=6, seed=7)["input_ids"]], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(prefix["attention_mask"], (0, 6), value=1),
    }
    outputs = []
    for implementation, make in (("turboquant", packed), ("eager", twin)):
        kept = prefilled(llama, implementation, make(llama, PADDING), prefix)
        kept.batch_repeat_interleave(3)
        outputs.append(run(llama, implementation, kept, inputs, num_beams=3))
    assert torch.equal(*outputs)
    kept = prefilled(llama, "turboquant", packed(llama, PADDING), prefix)
    with pytest.raises(ValueError, match=r"layer 0 holds .* cache\.batch_repeat_interleave\(n\)"):
        run(llama, "turboquant", kept, inputs, num_beams=3)


SETTINGS = {
    "no window": {"window": 0},
    "no exact tokens": {"sinks": 0, "extremes": 0},
    "sinks alone": {"sinks": 3, "extremes": 0},
    "extremes alone": {"sinks": 0, "extremes": 5},
    "no mean": {"mean_group": 0},
    "window below block": {"window": 3, "block": 8},
    "growing window": {"window": 6, "window_grows_from": 10},
    "odd window": {"window": 13, "block": 6, "mean_group": 12},
    "few bits": {"key_bits": 3, "value_bits": 2},
    "rules of the scales": {"key_scale": "least_squares", "value_scale": "matched_norm"},
    "parts": {"key_bits": "1/4x3+3/4x2", "value_bits": "1/2x4+1/2x1"},
    "map": {"key_bits": [[2, 4], "1/4x4+3/4x3", 1], "value_bits": [3, [4, "1/2x3+1/2x2"], 2]},
    "dense layers": {"dense_layers": (0, -1)},
    "16 bit scales": {"key_scale_bits": 16, "value_scale_bits": 16},
    "long search for codes": {"code_search": 9},
    "haar": {"rotation": "haar", "seed": 3},
    "no rotation": {"rotation": "none", "key_scale": "matched_norm", "value_scale": "unbiased"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(llama, settings):
    """Every setting, with padding longer than a block and than a window and block together."""
    padding = [0, 6, 29]
    check(llama, prompts(rows=3, padding=padding), padding, settings, prefill_chunk_size=11)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_longer_prompt_over_many_groups(name):
    model = cache_backbone(name)
    _, cache, _ = check(model, prompts(tokens=150, padding=[0, 70]), [0, 70], prefill_chunk_size=64)
    assert {layer.means.length for layer in cache.packed_layers} == {10}


@pytest.mark.parametrize("form", ["prod", "polar"])
def test_the_forms_of_the_papers(llama, form):
    """Read from codes or decoded, the same tokens."""
    inputs, settings = prompts(padding=PADDING), {"form": form, "key_bits": 3, "rotation": "haar"}
    expected = run(llama, "turboquant", packed(llama, PADDING, **settings), inputs)
    assert torch.equal(run(llama, "eager", packed(llama, PADDING, **settings), inputs), expected)
    assert not torch.equal(run(llama, "turboquant", packed(llama, PADDING, key_bits=3), inputs), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_gets_dense_tensors(llama, implementation):
    inputs = prompts(padding=PADDING)
    expected = run(llama, "turboquant", packed(llama, PADDING), inputs)
    assert torch.equal(run(llama, implementation, packed(llama, PADDING), inputs), expected)


def test_padding_without_left_padding_is_packed_like_any_token(llama):
    inputs = prompts(padding=PADDING)
    expected = run(llama, "sdpa", twin(llama), inputs)
    assert torch.equal(run(llama, "turboquant", packed(llama), inputs), expected)
    assert torch.equal(
        run(llama, "turboquant", packed(llama), inputs, prefill_chunk_size=9),
        run(llama, "sdpa", twin(llama), inputs, prefill_chunk_size=9),
    )


def test_the_attention_mask_names_the_padding(llama):
    inputs = prompts(padding=PADDING)
    expected = run(llama, "turboquant", packed(llama, PADDING), inputs)
    cache = packed(llama, inputs["attention_mask"])
    assert torch.equal(run(llama, "turboquant", cache, inputs), expected)
    assert [layer.starts.tolist() for layer in cache.packed_layers] == [PADDING] * 3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_wide_window_is_the_dense_cache(name):
    """Nothing leaves the window: exactly DynamicCache, whatever the bits."""
    model, inputs = cache_backbone(name), prompts(padding=PADDING)
    cache = packed(model, PADDING, window=200, key_bits=1, value_bits=1)
    tokens = run(model, "turboquant", cache, inputs)
    assert torch.equal(tokens, run(model, "sdpa", DynamicCache(config=model.config), inputs))
    assert all(layer.packed_length == 0 for layer in cache.packed_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """In half precision tokens may differ by rounding; the logits of the next token hardly do."""
    model = cache_backbone("qwen2").to(dtype)
    inputs = prompts(padding=PADDING)
    cache, naive = packed(model, PADDING), twin(model, PADDING)
    logits = []
    for implementation, kept in (("turboquant", cache), ("eager", naive)):
        prefilled(model, implementation, kept, inputs)
        with torch.no_grad():
            ids = prompts(tokens=3)["input_ids"]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
            logits.append(model(ids, attention_mask=mask, past_key_values=kept).logits.float())
    assert cache.packed_layers[0].recent.keys.dtype == dtype
    error = (logits[0] - logits[1]).square().mean().sqrt() / logits[1].square().mean().sqrt()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert run(model, "turboquant", packed(model, PADDING), inputs).shape == (2, 45 + NEW)
