"""A checkpoint's own code, where msa_hf is not installed and where it is: the same tokens as the package."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import remote_code_story
import torch
from bare_environment import ROOTS, BareEnvironment
from hub_cases import contents
from hub_server import hub_of_this_process
from safetensors.torch import load_file
from tiny_models import tiny_model

from msa_hf import MSAForCausalLM, TurboQuantCache, kernel_export
from msa_hf.modeling.cache_settings import CacheSettings
from msa_hf.modeling.calibration_files import Calibration, identity
from msa_hf.modeling.checkpoint_code import AUTO_MAP
from msa_hf.modeling.fitted_transforms import FittedTransforms

PROJECT = Path(__file__).resolve().parent.parent
MODELS = {
    "chat": ({"kind": "llama"}, ["attention", "router"]),
    "msa": ({"kind": "qwen3", "prompt_format": "msa"}, ["attention", "router", "generative"]),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return BareEnvironment(tmp_path_factory.mktemp("bare"))


def saved(folder, tokenizer, **fields):
    tiny_model(**fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def code_of(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def complete_code():
    """The files of modeling/ that the models need, found by their imports, with the kernels as source."""
    sources, waiting = {}, ["modeling_msa"]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" not in sources:
            sources[f"{name}.py"] = text = (PROJECT / "modeling" / f"{name}.py").read_text()
            waiting += re.findall(r"^\s*from \.(\w+) import", text, re.M)
    return sources | {"triton_ops.py": kernel_export.amalgamate()}


# What is written


def test_a_saved_model_is_complete(tiny_tokenizer, tmp_path):
    """Configuration, shards, tokenizer, generation settings, all of the code, and the classes for all Auto
    classes."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(model.state_dict()) and len(set(index.values())) >= 3
    for name, tensor in model.state_dict().items():
        assert load_file(tmp_path / index[name])[name].equal(tensor)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert code_of(tmp_path) == complete_code()


def test_a_saved_base_model_is_complete(tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert code_of(tmp_path) == complete_code()
    tiny_model().config.save_pretrained(tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "config.json").read_text())["auto_map"]
    assert alone == {"AutoConfig": AUTO_MAP["AutoConfig"]}, "there are no models beside it"


def test_classes_of_another_repository_become_those_that_are_saved(tmp_path):
    """As of a model that was loaded from the Hub; what somebody has added to its code stays."""
    model = tiny_model()
    model.config.auto_map = {name: f"user/model--{own}" for name, own in AUTO_MAP.items()}
    model.config.auto_map["AutoModelForSequenceClassification"] = "own_file.OwnClass"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == AUTO_MAP | {"AutoModelForSequenceClassification": "own_file.OwnClass"}


def test_push_to_hub_sends_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps its first endpoint
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="user/saved")
        tiny_model().push_to_hub("user/pushed")
        repositories = [server.files(name) for name in ("user/saved", "user/pushed")]
    for sent in repositories:
        assert json.loads(sent["config.json"])["auto_map"] == AUTO_MAP
        assert {name: text.decode() for name, text in sent.items() if name.endswith(".py")} == complete_code()
        assert {"generation_config.json", "model.safetensors"} <= set(sent)


@pytest.fixture
def calibrations(tmp_path, monkeypatch):
    """The folder of two registered calibrations of the tiny model, one of them with transforms."""
    monkeypatch.setattr("msa_hf.modeling.calibration_files._folders", [tmp_path / "registered"])
    config, widths = tiny_model().config, {"keys": "1/2x4+1/2x1", "values": "1/2x3+1/2x1"}
    settings = CacheSettings(key_bits=widths["keys"], value_bits=widths["values"], window=4, block=4)
    torch.manual_seed(0)
    matrices = {
        f"layers.{layer}.{kind}": torch.linalg.qr(torch.randn(2, 8, 8)).Q.half()
        for layer in range(3)
        for kind in widths
    }
    for preset, transforms in (("2.7bit", FittedTransforms(matrices)), ("1.8bit", None)):
        made = Calibration(settings, identity(config), transforms, "", {})
        made.save_pretrained(tmp_path / "registered" / f"tiny-{preset}")
    return tmp_path / "registered"


def test_calibrations_travel_with_a_checkpoint(calibrations, bare, tiny_tokenizer, tmp_path):
    """Presets that are calibrated here are calibrated alike where only the checkpoint is."""
    folder = saved(tmp_path / "model", tiny_tokenizer)
    for preset in ("2.7bit", "1.8bit"):
        sent = {path.name: path.read_bytes() for path in (folder / "calibrations" / preset).iterdir()}
        own = {path.name: path.read_bytes() for path in (calibrations / f"tiny-{preset}").iterdir()}
        assert sent == own
    program = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

def tell(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    batch = tokenizer("Which city lies on the Seine, and where to?", return_tensors="pt").data
    told = []
    for preset in ("2.7bit", "1.8bit", "3bit"):
        cache = {"backend": "turboquant", "preset": preset}
        batch |= {"cache_implementation": "quantized", "cache_config": cache, "max_new_tokens": 12}
        out = model.generate(**batch, do_sample=False, return_dict_in_generate=True)
        told.append([out.sequences.tolist(), out.past_key_values.settings.to_dict()])
    return told, model

if __name__ == "__main__":
    told, model = tell(sys.argv[1], True)
    model.save_pretrained(sys.argv[2])
    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).save_pretrained(sys.argv[2])
    print(json.dumps([told, tell(sys.argv[2], True)[0]]))
"""
    (tmp_path / "program.py").write_text(program)
    expected = runpy.run_path(str(tmp_path / "program.py"))["tell"](folder, False)[0]
    assert len({str(tokens) for tokens, _ in expected}) == 3, "transforms and bits must be seen"
    again = tmp_path / "again"
    assert bare.run(program, folder, again) == json.loads(json.dumps([expected, expected]))
    written, first = contents(again), contents(folder)
    assert written.pop("tokenizer_config.json") and first.pop(
        "tokenizer_config.json"
    )  # says where it was read
    assert written == first


def test_calibrations_come_from_the_hub(calibrations, tmp_path, monkeypatch, caplog):
    """Those of the commit that the model was loaded at."""
    tiny_model().save_pretrained(tmp_path / "model")
    expected = TurboQuantCache(tiny_model().config, "2.7bit").settings
    monkeypatch.setattr("msa_hf.modeling.calibration_files._folders", [])
    assert TurboQuantCache(tiny_model().config, "2.7bit").settings != expected
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        commit = server.add("user/model", contents(tmp_path / "model"))
        server.add("user/model", {"calibrations/2.7bit/calibration.json": b"of a later commit"})
        model = MSAForCausalLM.from_pretrained("user/model", revision=commit)
        assert TurboQuantCache(model.config, "2.7bit").settings == expected
        model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "calibrations" / "1.8bit" / "calibration.json").is_file()
    for path in (tmp_path / "again").rglob("calibration.*"):
        path.unlink()
    again = MSAForCausalLM.from_pretrained(tmp_path / "again")
    assert TurboQuantCache(again.config, "2.7bit").settings != expected
    assert "no calibration is beside" in caplog.text


# Without the package


def test_the_bare_environment_is_bare(bare):
    program = """
import importlib.util, json
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
    fields, retrievals = MODELS[name]
    folder, here, there = saved(tmp_path / "model", tiny_tokenizer, **fields), tmp_path / "1", tmp_path / "2"
    expected = remote_code_story.tell(folder, here, retrievals, trust=False)
    assert expected["quantised, sdpa"] != expected["plain"], "codes so coarse must be seen"
    found = bare.run(Path(remote_code_story.__file__), folder, there, ",".join(retrievals))
    assert found == json.loads(json.dumps(expected))
    assert code_of(there / "again") == code_of(folder) == complete_code()
    assert {path.name for path in (there / "again").iterdir()} == {path.name for path in folder.iterdir()}


def test_kernels_come_with_the_checkpoint(tiny_tokenizer, tmp_path):
    """With triton, but without msa_hf: interpreted on a CPU."""
    pytest.importorskip("triton")
    environment = BareEnvironment(tmp_path / "environment", (*ROOTS, "triton"))
    folder = saved(tmp_path / "model", tiny_tokenizer, head_dim=16)
    program = """
import json, os, sys
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from importlib import import_module
from transformers import AutoModelForCausalLM, AutoTokenizer
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).to(device)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
ops = import_module(type(model).__module__.replace("modeling_msa", "ops"))
cache = {"backend": "turboquant", "preset": "3bit", "window": 16, "block": 16, "mean_group": 16}
batch = tokenizer("Which city lies on the Seine, and where to?", return_tensors="pt").to(device).data
told = []
for choice in (False, True):
    ops.use_kernels(choice)
    memory = model.encode_memory(["Paris lies on the Seine.", "Honey never spoils."], tokenizer)
    batch |= {"cache_implementation": "quantized", "cache_config": cache, "max_new_tokens": 4}
    tokens = model.generate(**batch, memory=memory, retrieval="attention", do_sample=False)
    told.append([ops.backend(device)[0], tokens.tolist()])
print(json.dumps(told))
"""
    (plain, expected), (kernels, tokens) = environment.run(program, folder)
    assert (plain, kernels) == ("torch", "triton")
    assert tokens == expected


def test_a_tokenizer_needs_no_trust(bare, tiny_tokenizer, tmp_path):
    """With trust_remote_code=False nobody is asked, and none of the code runs."""
    folder = saved(tmp_path / "model", tiny_tokenizer)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('this must not run')")
    program = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(json.dumps([tokenizer("A question?")["input_ids"], tokenizer.chat_template]))
"""
    expected = [tiny_tokenizer("A question?")["input_ids"], tiny_tokenizer.chat_template]
    assert bare.run(program, folder) == expected


# Beside the package


@pytest.mark.parametrize("order", ["package first", "package last"])
def test_copies_share_a_process(order, tiny_tokenizer, tmp_path):
    """Models, memories, caches and stores of two remote copies and of the package, each with each."""
    first, second = (saved(tmp_path / name, tiny_tokenizer) for name in ("first", "second"))
    for path in second.glob("*.py"):
        path.write_text(path.read_text() + "\n# another release\n")
    keep = {"PYTHONPATH": str(PROJECT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, PROJECT / "tests" / "remote_code_copies.py", first, second, order],
        env=os.environ | keep | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"dense memory", "packed memory", "router", "cache, sdpa", "store, 4", "copied"} <= set(told)
    for case, tokens in told.items():
        assert len({str(own) for own in tokens.values()}) == 1, (case, tokens)
    assert told["cache, sdpa"] != told["copied"] != told["dense memory"]
