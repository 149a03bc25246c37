"""Attention on codes against attention written out over the decoded cache, and over caches that hold none."""

import logging
from dataclasses import replace

import pytest
import torch
from backbones import cache_backbone
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from msa_hf.modeling import attention_turboquant, packed_states
from msa_hf.modeling.attention_turboquant import turboquant_attention, turboquant_mask
from msa_hf.modeling.cache_settings import CacheSettings
from msa_hf.modeling.cache_turboquant import TurboQuantCache
from msa_hf.modeling.layer_turboquant import TurboQuantLayer
from msa_hf.modeling.packed_states import LayerView, PackedStates

B, H, G, D = 2, 6, 2, 24
PADDING = [0, 5]
SMALL = {"window": 8, "block": 4, "mean_group": 16, "sinks": 2, "extremes": 2, "code_search": 2}
# RMS error over RMS: what rounding the decoded cache and the output to the model's precision may cost.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Attention(torch.nn.Module):
    num_key_value_groups = H // G

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def states(tokens, seed=0, heads=G, dtype=torch.float32):
    """Keys with an offset per channel, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    offset = 2 * torch.randn(1, heads, 1, D, generator=generator)
    return (torch.randn(B, heads, tokens, D, generator=generator) + offset).to(dtype)


def handles(queries, past=43, padding=PADDING, dtype=torch.float32, **settings):
    """Keys and values of a layer that packed most of `past` tokens before the last `queries` came."""
    layer = TurboQuantLayer(CacheSettings(**{**SMALL, **settings}), 0, padding)
    layer.update(states(past, 1, dtype=dtype), states(past, 2, dtype=dtype))
    keys, values = layer.update(states(queries, 3, dtype=dtype), states(queries, 4, dtype=dtype))
    assert keys.packed_view.packed_length >= 28
    return keys, values


def written_out(query, keys, values, allowed, scaling=None, softcap=None, s_aux=None):
    """Attention over dense keys in float64; `allowed` [B, 1, Q, T] is bool or additive. Rows that may attend
    to nothing give zeros."""
    keys, values = (x.double().repeat_interleave(H // G, dim=1) for x in (keys, values))
    scores = query.double() @ keys.mT * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
    if s_aux is not None:
        sink = s_aux.double().view(1, H, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2)


def error(output, expected):
    return float((output.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def causal(queries, length, window=None):
    position = torch.arange(length - queries, length)[:, None]
    allowed = torch.arange(length) <= position
    return allowed if window is None else allowed & (torch.arange(length) > position - window)


def real(length):
    return torch.arange(length) >= torch.tensor(PADDING)[:, None]


def masks(kind, queries, length):
    """(what the function is given, what it means as [B, 1, Q, T] bool or additive)."""
    full = (causal(queries, length) & real(length)[:, None])[:, None]
    if kind == "none":
        return None, causal(queries, length).expand(B, 1, -1, -1)
    if kind == "padding":
        return real(length), full
    if kind == "sliding":
        narrow = full & causal(queries, length, window=21)
        return narrow, narrow
    lowest = torch.finfo(torch.float32).min if kind == "additive, finite" else -torch.inf
    bias = 0.1 * torch.randn(B, 1, queries, length, generator=torch.Generator().manual_seed(9))
    added = bias.masked_fill(~full, lowest)
    return added, added


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("mask", ["none", "padding", "sliding", "additive", "additive, finite"])
@pytest.mark.parametrize("queries", [1, 7])
def test_equals_attention_written_out(queries, mask, options, dtype, monkeypatch):
    options = {
        "plain": {"scaling": 0.3},
        "softcap": {"softcap": 1.5},
        "sinks": {"s_aux": torch.linspace(-2, 3, H)},
    }[options]
    keys, values = handles(queries, dtype=dtype)
    query = states(queries, 5, heads=H, dtype=dtype)
    given, allowed = masks(mask, queries, keys.shape[2])
    expected = written_out(query, keys.dense(), values.dense(), allowed, **options)
    for at_once in (1 << 24, 2 * B * H * keys.shape[2], 1):
        monkeypatch.setattr(attention_turboquant, "_SCORES_AT_ONCE", at_once)
        output, weights = turboquant_attention(Attention(), query, keys, values, given, **options)
        assert weights is None and output.dtype == dtype and output.shape == (B, queries, H, D)
        assert error(output, expected) < TOLERANCE[dtype]


SETTINGS = {
    "no mean": {"mean_group": 0},
    "one mean per block": {"mean_group": 4},
    "no exact tokens": {"sinks": 0, "extremes": 0},
    "more exact tokens than tokens": {"extremes": 60},
    "heads of their own": {"key_bits": [[2, 4]], "value_bits": [[3, "1/2x3+1/2x2"]]},
    "parts": {"key_bits": "1/4x3+3/4x2", "value_bits": "1/2x4+1/2x1"},
    "16 bit scales": {"key_scale_bits": 16, "value_scale_bits": 16},
    "haar": {"rotation": "haar"},
    "no window": {"window": 0},
}


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting(settings, queries):
    keys, values = handles(queries, **settings)
    query = states(queries, 5, heads=H)
    given, allowed = masks("padding", queries, keys.shape[2])
    output, _ = turboquant_attention(Attention(), query, keys, values, given)
    expected = written_out(query, keys.dense(), values.dense(), allowed)
    assert error(output, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_that_attends_to_nothing_gives_zeros(softcap):
    """A chunk of padding after packed padding: NaN here would be refused as a key of the next layer."""
    layer = TurboQuantLayer(CacheSettings(**SMALL), 0, [30, 0])
    layer.update(states(20, 1), states(20, 2))
    keys, values = layer.update(states(5, 3), states(5, 4))
    attended = torch.arange(25) >= torch.tensor([30, 0])[:, None]
    query = states(5, 5, heads=H)
    output, _ = turboquant_attention(Attention(), query, keys, values, attended, softcap=softcap)
    assert (output[0] == 0).all()
    allowed = (causal(5, 25) & attended[:, None])[:, None]
    assert error(output, written_out(query, keys.dense(), values.dense(), allowed, softcap=softcap)) < 2e-6


def test_no_token_is_hidden_once_no_exact_token_is_left():
    """Heads whose exact tokens were all cropped away read every token from its code, the first one too."""
    layer = TurboQuantLayer(CacheSettings(**{**SMALL, "sinks": 0}))
    keys, values = states(40, 1), states(40, 2)
    keys[:, :, 20:24] *= 9
    layer.update(keys, values)
    layer.crop(-22)
    assert (layer.exact.positions == -1).all()
    keys, values = layer.update(states(1, 3), states(1, 4))
    query = 8 * keys.dense()[:, :, :1].repeat_interleave(H // G, dim=1)  # looks for the first token
    output, _ = turboquant_attention(Attention(), query, keys, values, None)
    allowed = torch.ones(B, 1, 1, 19, dtype=torch.bool)
    assert error(output, written_out(query, keys.dense(), values.dense(), allowed)) < 2e-6


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_dense_keys(queries, is_causal, softcap):
    """Cross-attention and encoders share the implementation's name; without a mask they see everything."""
    keys, values, query = states(9, 1), states(9, 2), states(queries, 5, heads=H)
    allowed = causal(queries, 9) if is_causal else torch.ones(queries, 9, dtype=torch.bool)
    output, _ = turboquant_attention(Attention(is_causal), query, keys, values, None, softcap=softcap)
    expected = written_out(query, keys, values, allowed.expand(B, 1, -1, -1), softcap=softcap)
    assert error(output, expected) < 2e-6
    other, _ = turboquant_attention(
        Attention(not is_causal), query, keys, values, None, softcap=softcap, is_causal=is_causal
    )
    assert torch.equal(output, other)


def test_layers_on_several_devices_share_a_transform():
    """Whatever device a transform was used on last, reading asks for its own."""

    class Elsewhere:
        def __init__(self, transform):
            self.to = lambda device: transform

    view = handles(1)[0].packed_view
    moved = {
        kind: tuple(replace(part, transform=Elsewhere(part.transform)) for part in getattr(view, kind))
        for kind in ("key_codes", "value_codes")
    }
    keys, values = (PackedStates(replace(view, **moved), kind) for kind in ("keys", "values"))
    output, _ = turboquant_attention(Attention(), states(1, 5, heads=H), keys, values, None)
    expected = written_out(states(1, 5, heads=H), view.dense_keys(), view.dense_values(), causal(1, 44))
    assert error(output, expected) < TOLERANCE[torch.float32]


OPERATIONS = {
    "add": lambda x: x + 1,
    "scores": lambda x: states(3, 6) @ x.mT,
    "index": lambda x: x[:, :, -3:],
    "gather": lambda x: x[torch.tensor([1, 0]), 1],
    "cast": lambda x: x.to(torch.bfloat16),
    "concatenate": lambda x: torch.cat([x, x], dim=2),
    "repeat for query heads": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(B, H, x.shape[2], D),
    "view": lambda x: x.transpose(1, 2).flatten(2),
    "sdpa": lambda x: F.scaled_dot_product_attention(states(3, 6), x, x),
    "sum": lambda x: x.sum(),
    "clone": lambda x: x.clone(),
    "out": lambda x: torch.add(x, 1, out=torch.empty(x.shape)),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_any_operation_on_a_handle_is_that_of_the_dense_tensor(operation):
    for handle in handles(2):
        result = operation(handle)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(handle.dense()))


def test_a_handle_looks_like_its_tensor():
    keys, values = handles(2)
    for handle in (keys, values):
        dense = handle.dense()
        assert (handle.shape, handle.dtype, handle.device) == (dense.shape, dense.dtype, dense.device)
        assert (handle.dim(), len(handle), handle.size(-2)) == (4, B, 45)
        assert handle.stride() == dense.stride() and handle.is_contiguous()
        assert "45, 24], 32 tokens packed" in repr(handle)
    assert torch.equal(keys.dense()[:, :, -2:], states(2, 3))
    assert torch.equal(values.dense()[:, :, -2:], states(2, 4))


def test_the_warning_comes_once_and_only_where_the_cache_is_decoded(caplog, monkeypatch):
    monkeypatch.setattr(packed_states, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="msa_hf.modeling.packed_states"):
        keys, values = handles(1)
        for kind in ("dense_keys", "dense_values"):
            monkeypatch.setattr(LayerView, kind, lambda self: pytest.fail("decoded"))
        turboquant_attention(Attention(), states(1, 5, heads=H), keys, values, real(44))
        assert not caplog.records
        monkeypatch.undo()
        monkeypatch.setattr(packed_states, "_warned", set())
        for _ in range(2):
            keys.sum(), values.sum()
    assert len(caplog.records) == 1
    assert 'model.set_attn_implementation("turboquant") reads codes' in caplog.text


def batch(padding_side="left"):
    ids = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if padding_side == "left" else slice(-6, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_training_without_a_cache(name, padding_side):
    """Loss and every gradient are those of the model's own attention, of all tokens that follow real ones."""
    inputs = batch(padding_side)
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~(real & real.roll(1, dims=1)), -100)
    losses, gradients = [], []
    for implementation in ("turboquant", "eager"):
        model = cache_backbone(name).train()
        model.set_attn_implementation(implementation)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[1].items():
        assert torch.allclose(gradients[0][key], expected, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_caches_that_hold_dense_tensors(name, kind):
    model, inputs, outputs = cache_backbone(name), batch(), []
    for implementation in ("turboquant", "eager"):
        model.set_attn_implementation(implementation)
        cache = StaticCache(model.config, 64) if kind == "static" else DynamicCache(config=model.config)
        outputs.append(model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", ["bool", "additive"])
def test_a_mask_of_the_users_own(shape):
    """A 4-D mask for a tree or a prefix says everything, past tokens included."""
    model, ids = cache_backbone("llama"), batch()["input_ids"]
    tail = torch.randint(3, 259, (2, 4), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(2, 1, 4, 24, generator=generator) < 0.6
    allowed[..., -4:] = torch.eye(4, dtype=torch.bool)
    mask = allowed if shape == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    logits = []
    for implementation in ("turboquant", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = TurboQuantCache(model.config, **SMALL)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            logits.append(model(tail, attention_mask=mask, past_key_values=cache).logits)
        assert cache.packed_layers[0].packed_length == 16
    assert torch.allclose(*logits, atol=1e-4)


def test_the_mask_function_builds_no_square_for_plain_causal_attention():
    mask = torch.ones(2, 30, dtype=torch.long)
    assert turboquant_mask(2, 4, 30, q_offset=26, attention_mask=mask) is None
    assert turboquant_mask(2, 4, 30, q_offset=26) is None
    mask[1, :7] = 0
    assert torch.equal(turboquant_mask(2, 4, 30, q_offset=26, attention_mask=mask), mask.bool())
    shorter = turboquant_mask(2, 4, 30, q_offset=26, attention_mask=mask[:, :28])
    assert torch.equal(shorter, F.pad(mask[:, :28], (0, 2)).bool())
    longer = turboquant_mask(2, 4, 40, q_offset=26, attention_mask=mask)  # a static cache's room
    expected = F.pad(causal(4, 30) & mask[:, None].bool(), (0, 10))
    assert torch.equal(longer, expected[:, None])
    assert isinstance(handles(1)[0], PackedStates)
