"""Converted checkpoints of every backbone family in stock Transformers, in a process without msa_hf.

What they give is compared with the backbones that they were made from.
"""

from pathlib import Path

import plain_transformers_story
import pytest
import torch
from backbones import BACKBONES, tiny_backbone
from bare_environment import ROOTS, BareEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, pipeline

from msa_hf import packages
from msa_hf.conversion import convert

MEMORY = {"router_layers": [1, 2], "chunk_size": 8, "router_chunk_size": 4}
CASES = [*((kind, torch.float32) for kind in BACKBONES), ("llama", torch.bfloat16), ("qwen3", torch.float16)]
NAMES = [f"{kind}-{str(dtype).removeprefix('torch.')}" for kind, dtype in CASES]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """As bare as it can be with `device_map`."""
    return BareEnvironment(tmp_path_factory.mktemp("environment"), (*ROOTS, "accelerate"))


@pytest.fixture(scope="module")
def found(environment, tiny_tokenizer, tmp_path_factory):
    """By case, what a process finds that has the checkpoints and Transformers."""
    root = tmp_path_factory.mktemp("pairs")
    for name, (kind, dtype) in zip(NAMES, CASES):
        backbone = tiny_backbone(kind).to(dtype)
        backbone.generation_config.eos_token_id = None
        backbone.save_pretrained(root / name / "original")
        tiny_tokenizer.save_pretrained(root / name / "original")
        convert(root / name / "original", root / name / "converted", **MEMORY)
    return environment.run(Path(plain_transformers_story.__file__), root)


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_writes_what_the_backbones_writes(found, name):
    original, converted = found[name]["pipeline"]
    assert converted == original
    single, batch, chat = converted
    assert len(batch) == len(plain_transformers_story.PROMPTS) and batch[0] == single
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("name", NAMES)
def test_automatic_placement_and_types_lose_nothing(found, name):
    """device_map="auto", dtype="auto": every tensor is there, with the type and values that were saved."""
    case = found[name]
    assert case["tokens"][0] == case["tokens"][1]
    assert case["types"] == [f"torch.{name.split('-')[1]}"]
    assert case["unfilled"] == case["other"] == []
    assert case["states"] <= (1e-5 if "float32" in name else 0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["memory", "all"])
def test_weights_on_disk_give_the_same(found, name, place):
    case = found[name][f"offloaded, {place}"]
    assert case["places"] == (["cpu", "disk"] if place == "memory" else ["disk"])
    assert case["fingerprints"][0] == case["fingerprints"][1]
    assert all(own == whole for own, whole in case["tokens"])
    assert len({str(whole) for _, whole in case["tokens"]}) >= 4, "memory and codes must be seen"


def test_real_smollm2_chats_as_its_backbone(environment, smollm2, tmp_path):
    """By its chat template, in a pipeline."""
    program = """
import json, sys
from transformers import pipeline
run = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, device_map="auto", dtype="auto")
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(json.dumps(run(messages, max_new_tokens=10, do_sample=False)[0]["generated_text"]))
"""
    file = packages.smollm2_gguf()
    original = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    run = pipeline("text-generation", model=original.eval(), tokenizer=AutoTokenizer.from_pretrained(smollm2))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = run(messages, max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert environment.run(program, smollm2) == expected
    assert "Paris" in expected[-1]["content"]
