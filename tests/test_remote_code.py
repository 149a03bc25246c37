"""A checkpoint's own code, where msa_hf is not installed and where it is: the same tokens as the package."""

import json
from pathlib import Path

import pytest
import remote_code_story
import torch
from bare_environment import BareEnvironment
from tiny_models import tiny_model

from msa_hf import kernel_export, modeling
from msa_hf.modeling.checkpoint_code import AUTO_MAP

MODELS = {
    "chat": (tiny_model, {"kind": "llama"}, ["attention", "router"]),
    "msa": (tiny_model, {"kind": "qwen3", "prompt_format": "msa"}, ["attention", "router", "generative"]),
}


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    return BareEnvironment(tmp_path_factory.mktemp("bare"))


def test_the_bare_environment_is_bare(bare):
    program = """
import importlib.util, json, sys
from importlib.metadata import distributions
absent = ("msa_hf", "triton", "peft", "accelerate", "gradio", "hypothesis", "pytest", "starlette")
found = [name for name in absent if importlib.util.find_spec(name)]
print(json.dumps([found, sorted({own.metadata["Name"] for own in distributions()})]))
"""
    found, names = bare.run(program)
    assert found == []
    assert names == sorted({own.metadata["Name"] for own in bare.distributions.values()})
    assert {"torch", "transformers", "safetensors"} <= set(names)


@pytest.mark.parametrize("name", MODELS)
def test_remote_code_gives_the_tokens_of_the_package(name, bare, tiny_tokenizer, tmp_path):
    make, fields, retrievals = MODELS[name]
    folder, here, there = tmp_path / "model", tmp_path / "here", tmp_path / "there"
    make(**fields).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    expected = remote_code_story.tell(folder, here, retrievals, trust=False)
    assert len({str(expected[key]) for key in ("plain", "quantised, sdpa")}) == 2
    found = bare.run(Path(remote_code_story.__file__), folder, there, ",".join(retrievals))
    assert found == json.loads(json.dumps(expected))
    for source in folder.glob("*.py"):  # what is saved again is the same code, none of it missing
        assert (there / "again" / source.name).read_bytes() == source.read_bytes()
    assert {path.name for path in (there / "again").iterdir()} == {path.name for path in folder.iterdir()}
