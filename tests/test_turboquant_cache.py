"""TurboQuantCache as a user meets it: which layers it packs, what it takes, what it refuses, what no other
quantised cache does."""

import copy
import gc
import pickle

import pytest
import torch
from backbones import CACHE_BACKBONES, cache_backbone, tiny_backbone
from cache_twin import TwinCache, TwinLayer
from transformers import DynamicCache, LlamaConfig, set_seed
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from msa_hf.modeling.cache_settings import PRESETS, CacheSettings
from msa_hf.modeling.cache_turboquant import TurboQuantCache
from msa_hf.modeling.layer_turboquant import TurboQuantLayer

SMALL = {"window": 8, "block": 4, "mean_group": 16, "sinks": 2, "extremes": 2, "code_search": 2}
THREE = ["llama", "qwen3", "gemma3"]
PADDING = [0, 13]
SLIDING = {
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "gemma2": CACHE_BACKBONES["gemma2"],
    "gemma3": CACHE_BACKBONES["gemma3"],
}
LINEAR = {
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
}


def built(kinds, name):
    kind, fields = kinds[name]
    model = tiny_backbone(kind, **fields)
    model.generation_config.eos_token_id = None
    return model


def prompts(rows=2, tokens=45, padding=PADDING, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding[:rows]):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, implementation, cache, inputs, **options):
    model.set_attn_implementation(implementation)
    set_seed(5)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


@torch.no_grad()
def prefilled(model, cache, inputs):
    model.set_attn_implementation("turboquant")
    model(**inputs, past_key_values=cache)
    return cache


def held_bytes(cache):
    """Bytes of every tensor that can be reached from a cache, storages counted once, shared tables not."""
    storages, seen, todo = {}, set(), [cache.layers]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (list, tuple, dict)) or hasattr(thing, "__dict__"):
            if type(thing).__name__ not in ("Transform", "function", "module"):
                todo += gc.get_referents(thing)
    return sum(storages.values())


class Part:
    def __init__(self, layer):
        self.layers = [layer]


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_are_right_and_smaller(name):
    """Layers with a window keep their own storage, the others are packed: the twin's tokens, fewer bytes."""
    model, inputs = built(SLIDING, name), prompts(tokens=90)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    for kind, layer in zip(kinds, cache.layers):
        assert type(layer) is (TurboQuantLayer if kind == "full_attention" else DynamicSlidingWindowLayer)
    assert "sliding_attention" in kinds
    twin, dense = TwinCache(model.config, CacheSettings(**SMALL), PADDING), DynamicCache(config=model.config)
    assert torch.equal(run(model, "turboquant", cache, inputs), run(model, "eager", twin, inputs))
    run(model, "eager", dense, inputs)
    if cache.packed_layers:
        assert held_bytes(cache) < 0.75 * held_bytes(dense)
    else:
        assert held_bytes(cache) == held_bytes(dense)


@pytest.mark.parametrize("name", THREE)
def test_packed_layers_take_a_fraction_of_the_bytes(name):
    """At 240 tokens and 4 bits packed layers take less than half of float32, window and all."""
    model, inputs = cache_backbone(name), prompts(rows=1, tokens=240, padding=[])
    cache = prefilled(model, TurboQuantCache(model.config, **SMALL), inputs)
    dense = prefilled(model, DynamicCache(config=model.config), inputs)
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, TurboQuantLayer)]
    sizes = [sum(held_bytes(Part(c.layers[i])) for i in packed) for c in (cache, dense)]
    assert packed and sizes[0] < 0.45 * sizes[1]


@pytest.mark.parametrize(
    "mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sampling", "beams"]
)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_stay_native(name, mode):
    model, inputs = built(LINEAR, name), prompts(tokens=36)
    cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    native = DynamicCache(config=model.config).layers
    for layer, own in zip(cache.layers, native):
        assert type(layer) is (TurboQuantLayer if type(own) is DynamicLayer else type(own))
    twin = TwinCache(model.config, CacheSettings(**SMALL), PADDING)
    assert torch.equal(
        run(model, "turboquant", cache, inputs, **mode), run(model, "eager", twin, inputs, **mode)
    )


@pytest.mark.parametrize("name", THREE)
def test_beams_are_scored_with_their_own_past(name):
    """The score of every beam is what its tokens are worth, one by one, in a cache never reordered."""
    model, inputs = cache_backbone(name), prompts()
    cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    found = run(
        model,
        "turboquant",
        cache,
        inputs,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert any(len({*beam} - {-1}) > 1 for beam in found.beam_indices.tolist())  # beams did change places
    alone = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    mask = inputs["attention_mask"].repeat_interleave(3, 0)
    ids, total = found.sequences[:, :45], torch.zeros(6)
    for step in range(45, found.sequences.shape[1]):
        with torch.no_grad():
            logits = model(
                ids,
                attention_mask=mask,
                position_ids=positions(mask)[:, -ids.shape[1] :],
                past_key_values=alone,
            ).logits[:, -1]
        ids = found.sequences[:, step : step + 1]
        total += logits.log_softmax(-1).gather(1, ids)[:, 0]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.allclose(total, found.sequences_scores, atol=1e-3)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("chunks", [[45], [13, 32], [20, 5, 5, 15], [1] * 45])
def test_left_padding_in_chunks_gives_the_logits_of_each_row_alone(name, chunks):
    """A row of a padded batch in chunks, against the twin of the same padded row alone in one piece."""
    model, inputs = cache_backbone(name), prompts()
    cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    start = 0
    model.set_attn_implementation("turboquant")
    for count in chunks:
        part = slice(start, start := start + count)
        prefix = {"attention_mask": inputs["attention_mask"][:, :start], "past_key_values": cache}
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"][:, part],
                **prefix,
                position_ids=positions(inputs["attention_mask"])[:, part],
            ).logits
    cuts = [sum(chunks[:i]) for i in range(1, len(chunks))]
    model.set_attn_implementation("eager")
    for row in range(2):
        twin, begin = TwinCache(model.config, CacheSettings(**SMALL), PADDING[row : row + 1]), 0
        for end in [*cuts, 45]:
            with torch.no_grad():
                alone = model(
                    input_ids=inputs["input_ids"][row : row + 1, begin:end],
                    attention_mask=inputs["attention_mask"][row : row + 1, :end],
                    position_ids=positions(inputs["attention_mask"])[row : row + 1, begin:end],
                    past_key_values=twin,
                ).logits
            begin = end
        assert torch.allclose(logits[row, -1], alone[0, -1], rtol=1e-3, atol=1e-3)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_as_the_original(name, way):
    model, inputs = cache_backbone(name), prompts()
    cache = prefilled(model, TurboQuantCache(model.config, **SMALL, left_padding=PADDING), inputs)
    more = {
        "input_ids": torch.cat([inputs["input_ids"], prompts(tokens=9, padding=[])["input_ids"]], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1),
    }
    other = way(cache)
    expected = run(model, "turboquant", cache, more)
    assert other.get_seq_length() == 45 and cache.get_seq_length() == 63
    assert torch.equal(run(model, "turboquant", other, more), expected)
    assert held_bytes(other) == held_bytes(cache)


@pytest.mark.parametrize("name", THREE)
def test_one_cache_for_one_prompt_after_another(name):
    model, inputs = cache_backbone(name), prompts()
    cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    first = run(model, "turboquant", cache, inputs)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, "turboquant", cache, inputs), first)


def test_with_gradients_on_it_works_as_well():
    """Without no_grad, as in a notebook: the same logits over several steps, and gradients of the last."""
    model, inputs = cache_backbone("llama"), prompts()
    model.set_attn_implementation("turboquant")
    more = prompts(tokens=20, padding=[])["input_ids"]
    logits = []
    for enabled in (True, False):
        cache = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
        mask = inputs["attention_mask"]
        with torch.set_grad_enabled(enabled):
            model(**inputs, past_key_values=cache)
            for token in more.split(1, dim=1):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                output = model(token, attention_mask=mask, past_key_values=cache).logits
        logits.append(output)
    assert torch.equal(logits[0].detach(), logits[1])
    logits[0].sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_what_generate_asks_of_a_cache():
    config = cache_backbone("gemma3").config
    cache = TurboQuantCache(config)
    assert len(cache) == 3 and cache.is_sliding == [True, False, True]
    assert not cache.is_compileable and cache.is_croppable
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    assert cache.attention_implementation == "turboquant"
    assert cache.get_mask_sizes(7, 1) == (7, 0)


def test_dense_layers_are_those_of_transformers():
    cache = TurboQuantCache(cache_backbone("llama").config, dense_layers=[0, -1])
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, TurboQuantLayer, DynamicLayer]
    assert type(TwinCache(cache_backbone("llama").config, cache.settings).layers[1]) is TwinLayer


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_generate(preset):
    model = cache_backbone("llama")
    cache = TurboQuantCache(model.config, preset, window=8, block=4, mean_group=0)
    assert run(model, "turboquant", cache, prompts(padding=[])).shape == (2, 55)
    assert all(layer.packed_length == 44 for layer in cache.packed_layers)


def test_a_preset_is_where_changes_start():
    config = cache_backbone("llama").config
    assert TurboQuantCache(config, "3bit", sinks=7).settings == CacheSettings(
        key_bits=3, value_bits=3, sinks=7
    )
    mine = CacheSettings(key_bits=2)
    assert TurboQuantCache(config, mine).settings is mine
    assert TurboQuantCache(config, mine, value_bits=1).settings == CacheSettings(key_bits=2, value_bits=1)
    with pytest.raises(ValueError, match="preset must be one of 4bit, .*; got '5bit'"):
        TurboQuantCache(config, "5bit")
    with pytest.raises(ValueError, match="unknown cache settings: windows"):
        TurboQuantCache(config, windows=3)


def test_settings_survive_plain_data():
    mine = CacheSettings(key_bits=[4, [3, "1/4x3+3/4x2"]], dense_layers=(0, -1), seed=7, rotation="haar")
    assert CacheSettings.from_dict(mine.to_dict()) == mine


def test_a_bit_map_of_tuples_is_one_of_lists_and_a_copy():
    rows = [[4, 3], 2]
    assert CacheSettings(key_bits=((4, 3), 2)) == (mine := CacheSettings(key_bits=rows))
    rows[0][0] = 1
    assert mine.key_bits == [[4, 3], 2]


@pytest.mark.parametrize(
    "field, value, rule",
    [
        *(
            (field, -1, "whole number of at least 0")
            for field in ("window", "sinks", "extremes", "mean_group")
        ),
        *(
            (field, 1.5, "whole number")
            for field in ("window", "block", "sinks", "extremes", "mean_group", "code_search")
        ),
        *((field, True, "whole number") for field in ("window", "block", "sinks", "extremes", "mean_group")),
        *((field, 0, "whole number of at least 1") for field in ("block", "code_search")),
        *(
            ("window_grows_from", start, "None or a whole number of at least 1")
            for start in (0, -5, 1.5, True)
        ),
        ("mean_group", 100, "multiple of block = 64"),
        *(("seed", seed, "whole number") for seed in (-1, 1.5, True)),
        *(("dense_layers", layers, "whole numbers") for layers in (0, (1.5,), ("0",), (True,))),
        *(
            (field, bits, "1 to 6")
            for field in ("key_bits", "value_bits")
            for bits in (0, 7, 2.5, None, True)
        ),
        *(
            (field, spec, "1 to 6")
            for field in ("key_bits", "value_bits")
            for spec in ("", "4", "1/0x3", "1/2x7", "1/2x3+")
        ),
        ("key_bits", [4, [4, 9]], "1 to 6"),
        *((field, "best", "least_squares, unbiased") for field in ("key_scale", "value_scale")),
        *((field, 12, "8, 16") for field in ("key_scale_bits", "value_scale_bits")),
        ("rotation", "fourier", "hadamard, haar, none"),
        ("form", "vq", "mse, prod, polar"),
    ],
)
def test_bad_settings_are_refused(field, value, rule):
    with pytest.raises(
        ValueError, match=f"{field} must be .*{rule}.*; got {value if isinstance(value, int) else ''}"
    ):
        CacheSettings(**{field: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dense_layers": (3,)}, "dense_layers must be between -3 and 2; got 3"),
        ({"dense_layers": (-4,)}, "dense_layers must be between -3 and 2; got -4"),
        ({"key_bits": [4, 4]}, "key_bits must name all 3 layers of this model; got 2"),
        ({"value_bits": [4, [4, 4], [4, 4, 4]]}, r"value_bits\[2\] must name all 2 key/value heads; got 3"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(cache_backbone("llama").config, **changes)


@pytest.mark.parametrize("bad", [3, [], [1, -1], [1.0, 2.0], torch.zeros(1, 2, 3)], ids=str)
def test_left_padding_is_counts_or_a_mask(bad):
    config = cache_backbone("llama").config
    with pytest.raises(ValueError, match="left_padding must hold the number of padding tokens before each"):
        TurboQuantCache(config, left_padding=bad)
    mask = [[0, 0, 1], [1, 1, 1], [0, 1, 0]]
    for good in (
        [2, 0, 1],
        (2, 0, 1),
        torch.tensor([2, 0, 1]),
        mask,
        torch.tensor(mask),
        torch.tensor(mask) > 0,
    ):
        assert TurboQuantCache(config, left_padding=good).layers[0].left_padding == [2, 0, 1]


def test_head_dims_that_cannot_be_cut_are_refused_at_the_first_token():
    states = torch.zeros(1, 2, 30, 6)
    cache = TurboQuantCache(LlamaConfig(num_hidden_layers=1), key_bits="1/4x3+3/4x2", **SMALL)
    with pytest.raises(ValueError, match="does not cut head_dim 6 into even numbers of channels"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 0


def test_offloading_needs_no_other_layer(monkeypatch):
    """CUDA streams apart, what `Cache` does with a layer: away after its update, back before the next."""
    model, inputs = cache_backbone("llama"), prompts()
    plain = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    expected = run(model, "turboquant", plain, inputs)
    moved = TurboQuantCache(model.config, **SMALL, left_padding=PADDING)
    update = moved.update

    def offloaded(keys, values, index, *args, **kwargs):
        moved.layers[index].prefetch()
        states = update(keys, values, index)
        moved.layers[index].offload()
        return states

    monkeypatch.setattr(moved, "update", offloaded)
    assert torch.equal(run(model, "turboquant", moved, inputs), expected)


BIASED = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(
    "bits, first", [(4, "1/8x4+7/8x4"), (5, "1/8x5+7/8x5"), (3, "1/8x5+7/8x4"), (1, "1/8x5+7/8x4")]
)
def test_the_first_layer_of_biased_keys_has_a_part_for_outliers(bits, first):
    biased = tiny_backbone("qwen2", **BIASED).config
    settings = TurboQuantCache(biased, key_bits=bits).settings
    assert settings.specs("keys", 0, 2) == [first] * 2
    assert settings.specs("keys", 1, 2) == settings.specs("keys", 2, 2) == [bits] * 2
    assert settings.specs("values", 0, 2) == [4] * 2
    assert TurboQuantCache(biased, key_bits=bits, first_key_bits=2).settings.specs("keys", 0, 2) == [2] * 2
    plain = tiny_backbone("llama", **BIASED).config
    assert TurboQuantCache(plain, key_bits=bits).settings.specs("keys", 0, 2) == [bits] * 2
    plain.attention_bias = True
    assert TurboQuantCache(plain, key_bits=bits).settings.specs("keys", 0, 2) == [first] * 2


@torch.no_grad()
def test_two_wide_channels_of_the_first_layer_do_not_spoil_the_others():
    model = tiny_backbone("qwen2", seed=3, **BIASED)
    bias = model.model.layers[0].self_attn.k_proj.bias
    bias.zero_()
    bias.view(-1, 16)[:, [0, 8]] = 40.0  # the fastest pair of RoPE, which no mean over tokens takes away
    ids = torch.randint(3, 259, (1, 200), generator=torch.Generator().manual_seed(0))
    small = {"window": 16, "block": 16, "mean_group": 64, "key_bits": 4, "value_bits": 4}

    def divergence(**changes):
        cache = TurboQuantCache(model.config, **small, **changes)
        model(ids[:, :160], past_key_values=cache)
        kept = model(ids[:, 160:], past_key_values=cache).logits.log_softmax(-1)
        return (dense.exp() * (dense - kept)).sum(-1).mean().item()

    dense = model(ids).logits[:, 160:].log_softmax(-1)
    assert divergence() < divergence(first_key_bits=4) / 2


def test_what_inference_mode_made_is_read_with_gradients():
    """Rotations are shared: the first cache that needs one may be in inference mode, the next in training."""
    settings = {**SMALL, "seed": 4711}  # a rotation that no other test has made
    model, ids = cache_backbone("llama"), torch.arange(3, 43)[None]
    model.set_attn_implementation("turboquant")
    with torch.inference_mode():
        model(ids, past_key_values=TurboQuantCache(model.config, **settings))
    with torch.no_grad():
        cache = TurboQuantCache(model.config, **settings)
        model(ids, past_key_values=cache)
    with torch.enable_grad():
        model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()
