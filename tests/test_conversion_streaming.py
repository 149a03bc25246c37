"""Conversion from file to file: what Transformers writes after loading the whole model, in less memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import tiny_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from msa_hf import MSAConfig, MSAForCausalLM, weight_streaming
from msa_hf.conversion import convert
from msa_hf.modeling.errors import ConversionError
from msa_hf.training.adapter import load_router, router_peft_config, save_router_adapter, write_settings
from msa_hf.weight_plan import ROUTER_SEED
from msa_hf.weight_streaming import WeightFiles, stored_tensors

MEMORY = {"router_layers": [1, 2], "chunk_size": 8, "router_chunk_size": 4}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder, tensors=None, config=None):
    """Rewrites a checkpoint's only file of weights, its config, or both."""
    if tensors is not None:
        new = tensors(load_file(folder / "model.safetensors"))
        save_file({name: own.clone() for name, own in new.items()}, folder / "model.safetensors")
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(fields)))


def without(*names):
    return lambda fields: {name: own for name, own in fields.items() if name not in names}


def as_decoder(tensors):
    """As old versions saved a decoder: no "model." before the names, and a buffer among the weights."""
    found = {name.removeprefix("model."): own for name, own in tensors.items()}
    return found | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def of_types(tensors):
    """MLPs in bfloat16, norms in float16, float64 in between."""
    kinds = {"mlp": torch.bfloat16, "norm": torch.float16, "v_proj": torch.float64}
    return {
        name: own.to(next((kind for part, kind in kinds.items() if part in name), own.dtype))
        for name, own in tensors.items()
    }


def nearly_equal(tensors):
    """Embeddings and head that differ, but not in bfloat16."""
    rounded = tensors[EMBEDDING].bfloat16().float()
    return tensors | {EMBEDDING: rounded, HEAD: rounded * (1 + 2**-20)}


# name: (backbone, its fields, how it was saved, what was changed, arguments of the conversion)
CASES = {
    "as it is": ("llama", {}, {}, {}, {}),
    "several files": ("qwen3", {}, {"max_shard_size": "30KB"}, {}, {}),
    "into several files": ("qwen2", {}, {"max_shard_size": "50KB"}, {}, {"max_shard_size": "20KB"}),
    "a file for every weight": ("mistral", {}, {}, {}, {"max_shard_size": 100}),
    "narrower": ("llama", {}, {}, {}, {"dtype": "bfloat16"}),
    "wider": ("llama", {"dtype": torch.bfloat16}, {}, {}, {"dtype": torch.float32}),
    "several types": ("llama", {}, {}, {"tensors": of_types}, {}),
    "no type in the config": ("llama", {}, {}, {"tensors": of_types, "config": without("dtype")}, {}),
    "another type first": ("llama", {}, {}, {"tensors": lambda t: t | {HEAD: t[HEAD].half()}}, {}),
    "another type first, none in the config": (
        "llama",
        {},
        {},
        {"tensors": lambda t: t | {HEAD: t[HEAD].half()}, "config": without("dtype")},
        {},
    ),
    "tied": ("qwen2", {"tie_word_embeddings": True}, {}, {}, {}),
    "tied, decoder": ("mistral", {"tie_word_embeddings": True}, {}, {"tensors": as_decoder}, {}),
    "tied, equal": (
        "llama",
        {"tie_word_embeddings": True},
        {},
        {"tensors": lambda t: t | {HEAD: t[EMBEDDING]}},
        {},
    ),
    "tied, equal once narrower": (
        "llama",
        {"tie_word_embeddings": True},
        {},
        {"tensors": nearly_equal},
        {"dtype": "bfloat16"},
    ),
    "tied, different": (
        "llama",
        {"tie_word_embeddings": True},
        {},
        {"tensors": lambda t: t | {HEAD: t[EMBEDDING] + 1}},
        {"max_shard_size": "30KB"},
    ),
}


def source_of(folder, tokenizer, kind, fields, saved, changed):
    fields = dict(fields)
    model = tiny_backbone(kind, **{k: v for k, v in fields.items() if k != "dtype"})
    model.to(fields.get("dtype", torch.float32)).save_pretrained(folder, **saved)
    tokenizer.save_pretrained(folder)
    change(folder, **changed)
    return folder


def loaded(source, dtype="auto"):
    """The whole model in memory, untrained routers drawn by Transformers."""
    config = MSAConfig.from_backbone(AutoConfig.from_pretrained(source), **MEMORY)
    torch.manual_seed(ROUTER_SEED)
    model = MSAForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    model.generation_config._from_model_config = False
    return model


def assert_same_files(folder, expected, but=()):
    """Every file that save_pretrained wrote is there, with the same bytes, and no other weights."""
    names = {path.name for path in expected.iterdir()} - set(but)
    assert names and {path.name for path in folder.glob("model*")} == {
        path.name for path in expected.glob("model*")
    }
    for name in sorted(names):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_loading_and_saving(case, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_streaming, "PORTION", 100)  # numbers: most tensors come in several portions
    *made, arguments = CASES[case]
    source = source_of(tmp_path / "source", tiny_tokenizer, *made)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = loaded(source, arguments.get("dtype", "auto"))
    size = {"max_shard_size": arguments.get("max_shard_size", "50GB")}
    model.save_pretrained(tmp_path / "expected", **size)
    folder = convert(source, tmp_path / "converted", **MEMORY, **arguments)
    assert_same_files(folder, tmp_path / "expected")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_generation_settings_come_from_either_config(tiny_tokenizer, tmp_path):
    source = source_of(tmp_path / "source", tiny_tokenizer, "llama", {}, {}, {})
    (source / "generation_config.json").unlink()
    change(source, config=lambda fields: fields | {"eos_token_id": 7})
    loaded(source).save_pretrained(tmp_path / "expected")
    assert_same_files(convert(source, tmp_path / "converted", **MEMORY), tmp_path / "expected")
    assert GenerationConfig.from_pretrained(tmp_path / "converted").eos_token_id == 7


@pytest.mark.parametrize(
    "dtype, written", [("float32", "auto"), ("bfloat16", "auto"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("lora", [False, True], ids=["routers", "lora"])
def test_an_adapter_is_merged_as_into_a_loaded_model(lora, dtype, written, tiny_tokenizer, tmp_path):
    """`load_router` on the whole model is the oracle; the adapter has a router layer less than the model."""
    fields = {"dtype": getattr(torch, dtype)}
    source = source_of(tmp_path / "source", tiny_tokenizer, "qwen2", fields, {"max_shard_size": "50KB"}, {})
    model = loaded(source, "float32")
    model.config.router_layers = [1]
    torch.manual_seed(1)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, router_peft_config(model, lora_rank=2))
    for name, parameter in model.named_parameters():
        if ".router_" in name or "lora_" in name:
            torch.nn.init.normal_(parameter)
    if lora:
        model.save_pretrained(tmp_path / "adapter")
        write_settings(model.config, tmp_path / "adapter")
    else:
        save_router_adapter(model, tmp_path / "adapter")
    plain = loaded(source, written)
    expected = load_router(loaded(source, written), tmp_path / "adapter")
    expected.save_pretrained(tmp_path / "expected")
    folder = convert(source, tmp_path / "converted", routers=tmp_path / "adapter", dtype=written)
    assert_same_files(folder, tmp_path / "expected", but=["config.json"])  # its fields have another history
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[name], plain.state_dict()[name]) is not lora
    assert [name for name in weights if ".router_" in name] == [
        f"model.layers.1.self_attn.router_{side}_proj.0.weight" for side in "kq"
    ]
    config = MSAConfig.from_pretrained(folder)
    assert config.routers_trained and config.router_layers == [1]


def test_an_adapter_with_other_tensors_is_refused(tiny_tokenizer, tmp_path):
    source = source_of(tmp_path / "source", tiny_tokenizer, "llama", {}, {}, {})
    save_router_adapter(loaded(source), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(259, 32)}, file)
    with pytest.raises(ValueError, match=r"routers and LoRA only; got base_model\.model\.lm_head"):
        convert(source, tmp_path / "converted", routers=tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


def test_files_have_the_bytes_that_safetensors_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_streaming, "PORTION", 7)
    torch.manual_seed(0)
    tensors = {
        "wide": torch.randn(7, 5),
        "scalar": torch.tensor(3.0),
        "größe": torch.randn(3, 4, 2).bfloat16(),
        "empty": torch.empty(0, 3),
        "long": torch.randn(23).double(),
        "half": torch.randn(3, 1).half(),
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    stored = stored_tensors([tmp_path / "expected.safetensors"])
    assert {name: (own.shape, own.dtype) for name, own in stored.items()} == {
        name: (tuple(own.shape), own.dtype) for name, own in tensors.items()
    }
    files = WeightFiles(tmp_path, tensors, "5GB")
    for name in reversed(tensors):
        assert torch.equal(stored[name].read(), tensors[name])
        files.write(name, stored[name].portions())
    files.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_weight_that_was_left_out_or_cut_is_an_error(tmp_path):
    tensors = {"one": torch.ones(4), "two": torch.ones(4)}
    files = WeightFiles(tmp_path, tensors, "5GB")
    with pytest.raises(ConversionError, match=r"one must have 16 bytes; got 12"):
        files.write("one", [torch.ones(3)])
    files.write("one", [torch.ones(1), torch.ones(3)])
    with pytest.raises(ConversionError, match=r"never written: \['two'\]"):
        files.finish()


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def no_json(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model"]}')


NORM = "model.norm.weight"
BROKEN = {
    "missing": (lambda f: change(f, without(NORM)), r"missing \['model\.norm\.weight'\], not used \[\]"),
    "unknown": (lambda f: change(f, lambda t: t | {"extra": torch.ones(1)}), r"not used \['extra'\]"),
    "shape": (
        lambda f: change(f, lambda t: t | {NORM: torch.ones(31)}),
        r"of another shape \['model\.norm\.weight \[31\] instead of \[32\]'\]",
    ),
    "twice": (lambda f: change(f, lambda t: t | {"norm.weight": t[NORM]}), "are the same weight: remove one"),
    "quantised": (
        lambda f: change(f, lambda t: t | {NORM: torch.ones(32, dtype=torch.int8)}),
        r"model\.norm\.weight must be one of F64, F32, BF16, F16; got I8",
    ),
    "cut": (cut, "model.safetensors cannot be read"),
    "index": (no_json, "index.json must hold weight_map"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_do_not_fit_are_named_before_anything_is_written(
    kind, tiny_tokenizer, tmp_path, monkeypatch
):
    source = source_of(tmp_path / "source", tiny_tokenizer, "llama", {}, {}, {})
    damage, message = BROKEN[kind]
    damage(source)
    monkeypatch.setattr(WeightFiles, "__init__", lambda *_: pytest.fail("weights were begun"))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "converted", **MEMORY)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_told_before_it_is_full(tiny_tokenizer, tmp_path, monkeypatch):
    source = source_of(tmp_path / "source", tiny_tokenizer, "llama", {}, {}, {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"needs 0\.0 GB for the weights"):
        convert(source, tmp_path / "converted", **MEMORY)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupted_among_the_weights_leaves_nothing(tiny_tokenizer, tmp_path, monkeypatch):
    source = source_of(tmp_path / "source", tiny_tokenizer, "llama", {}, {}, {})
    write, done = WeightFiles.write, []

    def interrupted(self, name, portions):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, portions)

    monkeypatch.setattr(WeightFiles, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "converted", **MEMORY)
    assert len(done) == 5 and [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def heavy(tmp_path_factory, tiny_tokenizer):
    """A tiny checkpoint, and one of about 110 MB: in 8 files of up to 16 MB, and in one."""
    root = tmp_path_factory.mktemp("heavy")
    fields = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4000}
    model = tiny_backbone("llama", **fields, head_dim=128, num_attention_heads=8).bfloat16()
    for name, size in (("parts", "16MB"), ("one", "5GB")):
        model.save_pretrained(root / name, max_shard_size=size)
        tiny_tokenizer.save_pretrained(root / name)
    assert len(list((root / "parts").glob("*.safetensors"))) == 8
    tiny_backbone("llama").save_pretrained(root / "tiny")
    tiny_tokenizer.save_pretrained(root / "tiny")
    yield root
    shutil.rmtree(root)


def memory_of(heavy, name, way):
    """Bytes that a conversion added to a process: anonymous memory, and all that was resident at once."""
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, root / "conversion_memory.py", heavy / "tiny", heavy / name, heavy / way, way],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root.parent), "OMP_NUM_THREADS": "1"},
    )
    shutil.rmtree(heavy / way, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of a process's memory"
)
@pytest.mark.parametrize("name", ["parts", "one"])
def test_memory_does_not_grow_with_the_model(heavy, name):
    """At most twice the largest of 8 files, be it read from those or from one; pages of files included."""
    shard = max(path.stat().st_size for path in (heavy / "parts").glob("*.safetensors"))
    growth = memory_of(heavy, name, "stream")
    assert 0 < growth["anonymous"] <= 2 * shard and growth["resident"] <= 2 * shard, growth
    if name == "parts":  # the measure sees a model that is held as a whole
        assert memory_of(heavy, name, "load")["resident"] > 6 * shard
