"""Who runs what: kernels on request and on CUDA, plain PyTorch without them, and after a failure for good."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import cache_backbone
from kernel_cases import DEVICE
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model

from msa_hf import TurboQuantCache, kernels
from msa_hf.modeling import ops

SETTINGS = {"window": 16, "block": 16, "mean_group": 16, "sinks": 2, "extremes": 2}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def with_kernels():
    ops.use_kernels(True)
    yield
    ops.use_kernels(None)


def cached_generation(model, rows=2, **options) -> torch.Tensor:
    ids = torch.randint(3, 250, (rows, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1:, :9] = 0
    cache = TurboQuantCache(model.config, left_padding=mask, key_bits=4, value_bits=3, **SETTINGS)
    model.set_attn_implementation("turboquant")
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False, **options
    )


def count_calls(monkeypatch, *names: str) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)
    for name in names:
        original = getattr(kernels, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)
    return calls


@pytest.mark.parametrize("mode", ({}, {"num_beams": 2}, {"prefill_chunk_size": 30}), ids=str)
def test_generation_with_kernels_gives_the_same_tokens(mode, monkeypatch, with_kernels):
    model = cache_backbone("qwen3", head_dim=16).to(DEVICE)
    calls = count_calls(monkeypatch, "decode_attention", "prefill_attention")
    ours = cached_generation(model, **mode)
    assert calls["decode_attention"] > 0 and (calls["prefill_attention"] > 0) == (
        "prefill_chunk_size" in mode
    )
    ops.use_kernels(False)
    assert torch.equal(ours, cached_generation(model, **mode))


def test_memory_with_kernels_answers_alike(monkeypatch, tiny_tokenizer, with_kernels):
    model = tiny_model("qwen3").to(DEVICE)
    calls = count_calls(
        monkeypatch, "pool_chunks", "route_scores", "document_maxima", "top_documents", "gather_dense"
    )

    def answer():
        bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
        batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True).to(DEVICE)
        with torch.no_grad():
            tokens = model.generate(
                **batch, memory=bank, retrieval="attention", max_new_tokens=6, do_sample=False
            )
        return bank, tokens

    bank, tokens = answer()
    assert all(calls.values()), calls
    ops.use_kernels(False)
    plain_bank, plain_tokens = answer()
    assert torch.equal(tokens, plain_tokens)
    for layer, memory in plain_bank.layers.items():
        for name in ("keys", "values", "router_keys"):
            torch.testing.assert_close(
                getattr(bank.layers[layer], name).data, getattr(memory, name).data, atol=1e-5, rtol=1e-5
            )


def test_training_differentiates_the_plain_products(monkeypatch, tiny_tokenizer, with_kernels):
    model = tiny_model("llama").to(DEVICE)
    calls = count_calls(monkeypatch, "pool_chunks", "route_scores")
    states = torch.randn(1, 9, 16, device=DEVICE, requires_grad=True)
    ops.pool_chunks(states, torch.tensor([9]), 4).sum().backward()
    assert states.grad is not None and not any(calls.values())
    assert next(model.parameters()).requires_grad


def test_a_kernel_that_fails_is_reported_once(monkeypatch, caplog, with_kernels):
    model = cache_backbone("llama", head_dim=16).to(DEVICE)
    ops.use_kernels(False)
    expected = cached_generation(model)
    ops.use_kernels(True)

    def broken(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(kernels, "decode_attention", broken)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_generation(model), expected)
    assert sum("no such instruction" in record.message for record in caplog.records) == 1
    assert ops.backend(DEVICE)[0] != "triton" and ops.kernels_for(DEVICE) is None
    if DEVICE.type == "cuda":
        assert "RuntimeError: no such instruction" in ops.backend(DEVICE)[1]


def test_backend_tells_what_runs():
    assert ops.backend("cpu")[0] != "triton"
    ops.use_kernels(True)
    try:
        name, reason = ops.backend("cpu")
        assert name == "triton" and "decode_attention" in reason
        ops.use_kernels(False)
        assert ops.backend("cuda") == ("torch", "plain PyTorch, because ops.use_kernels(False) says so")
    finally:
        ops.use_kernels(None)
    assert "there are no kernels for mps devices" in ops.backend("mps")[1]


def test_everything_works_without_triton():
    """A process that cannot import triton imports msa_hf, generates, and says what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import msa_hf
from msa_hf.modeling import ops
name, reason = ops.backend("cuda")
assert name == "torch" and "the kernels need triton: pip install triton" in reason, reason
assert ops.backend("cpu")[0] == "torch"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_importing_msa_hf_leaves_triton_alone():
    program = "import sys, msa_hf; assert 'msa_hf.kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
