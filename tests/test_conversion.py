"""A converted model without memory is its backbone, to the token; what cannot be converted says so."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from backbones import BACKBONES, tiny_backbone
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from msa_hf import MSAConfig, MSAForCausalLM, packages
from msa_hf.configs import preset, presets, routers_folder
from msa_hf.conversion import convert
from msa_hf.modeling.errors import ConversionError
from msa_hf.training.adapter import SETTINGS_FILE, save_router_adapter

VARIANTS = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-head-dim": {"head_dim": 12},
    "llama-no-groups": {"num_key_value_heads": 4},
    "llama-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama-dynamic": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {},
    "mistral-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen2-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen3": {},
    "qwen3-biases": {"attention_bias": True},
    "qwen3-tied": {"tie_word_embeddings": True},
}
MEMORY = {"router_layers": [1, 2], "chunk_size": 8, "router_chunk_size": 4}


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tiny_tokenizer, tmp_path_factory):
    """(original model, converted model) of one variant, both read from disk."""
    root = tmp_path_factory.mktemp(request.param)
    original = tiny_backbone(request.param.split("-")[0], **VARIANTS[request.param])
    source = save(original, tiny_tokenizer, root / "source")
    converted = convert(source, root / "converted", **MEMORY)
    return AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(converted)


@pytest.fixture
def batch(tiny_tokenizer):
    """Three prompts of different lengths, left-padded: input_ids [3, T], attention_mask [3, T]."""
    texts = ["Which court heard the case?", "Why?", "The treaty of 1648 ended which war, and where"]
    return tiny_tokenizer(texts, return_tensors="pt", padding=True).data


@torch.no_grad()
def test_logits_are_the_backbones(pair, batch):
    original, converted = pair
    assert type(converted) is MSAForCausalLM and converted.config.router_layers == [1, 2]
    ids = batch["input_ids"][2:]
    expected = original(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(converted(ids).logits, expected, atol=1e-5, rtol=0)
    real = batch["attention_mask"].bool()
    expected, found = original(**batch).logits[real], converted(**batch).logits[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


GENERATION = {
    "greedy": {"do_sample": False},
    "greedy, eager": {"do_sample": False, "attention": "eager"},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 8},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_generated_tokens_are_the_backbones(pair, batch, settings):
    settings, tokens = dict(settings), []
    attention = settings.pop("attention", "sdpa")
    for model in pair:
        torch.manual_seed(7)
        model.set_attn_implementation(attention)
        tokens.append(model.generate(**batch, **settings, max_new_tokens=6))
    assert torch.equal(*tokens)


def test_save_and_load_is_bit_exact(pair, tmp_path):
    _, converted = pair
    converted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == converted.config.to_diff_dict()
    before, after = converted.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(
        base.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("kind", BACKBONES)
def test_weights_keep_their_names_and_conversion_repeats(kind, tiny_tokenizer, tmp_path):
    source = save(tiny_backbone(kind), tiny_tokenizer, tmp_path / "source")
    first, second = (convert(source, tmp_path / name, **MEMORY) for name in ("first", "second"))
    old, new = load_file(source / "model.safetensors"), load_file(first / "model.safetensors")
    assert all(torch.equal(new.pop(name), tensor) for name, tensor in old.items())
    assert sorted(new) == [
        f"model.layers.{layer}.self_attn.router_{side}_proj.0.weight" for layer in (1, 2) for side in "kq"
    ]
    again = load_file(second / "model.safetensors")
    assert all(tensor.std() > 0 and torch.equal(tensor, again[name]) for name, tensor in new.items())
    config = json.loads((first / "config.json").read_text())
    assert config["routers_trained"] is False and config["backbone_type"] == kind


def test_result_stands_alone(tiny_tokenizer, tmp_path, batch):
    """Config, tokenizer, generation settings and code: Transformers alone gives the same tokens from it."""
    model = tiny_backbone("qwen2")
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.1)
    folder = convert(save(model, tiny_tokenizer, tmp_path / "source"), tmp_path / "converted", **MEMORY)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer.chat_template
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert (converted.generation_config.top_k, converted.generation_config.temperature) == (3, 0.5)
    expected = converted.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    script = (
        "import sys, torch; from transformers import AutoModel, AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"ids = torch.tensor({batch['input_ids'].tolist()})\n"
        "out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=8, do_sample=False)\n"
        "base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'msa_hf' not in sys.modules and type(base).__name__ == 'MSAModel'\n"
        "print(out.tolist())"
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_dtype_of_the_written_weights(tiny_tokenizer, tmp_path):
    source = save(tiny_backbone("llama").to(torch.bfloat16), tiny_tokenizer, tmp_path / "source")
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        folder = convert(source, tmp_path / str(expected), dtype=dtype, **MEMORY)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {expected}


def test_routers_of_an_adapter_are_merged(tiny_tokenizer, tmp_path):
    """The adapter's routers and memory fields become the checkpoint's; the backbone stays as it was."""
    source = save(tiny_backbone("llama"), tiny_tokenizer, tmp_path / "source")
    fields = {**MEMORY, "query_reduction": "mean"}
    trained = AutoModelForCausalLM.from_pretrained(convert(source, tmp_path / "plain", **fields))
    routers = {name: tensor.normal_() for name, tensor in trained.state_dict().items() if ".router_" in name}
    save_router_adapter(trained, tmp_path / "adapter", dtype=torch.float32)
    with pytest.raises(ConversionError, match=r"chunk_size must be 8"):
        convert(source, tmp_path / "merged", routers=tmp_path / "adapter", chunk_size=16)
    with pytest.raises(ConversionError, match="not the folder of a router adapter"):
        convert(source, tmp_path / "merged", routers=tmp_path / "plain")
    folder = convert(
        source, tmp_path / "merged", routers=tmp_path / "adapter", chunk_size=8, top_k_documents=5
    )
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.config.routers_trained and merged.config.top_k_documents == 5
    assert all(getattr(merged.config, name) == value for name, value in fields.items())
    state, backbone = merged.state_dict(), tiny_backbone("llama").state_dict()
    assert len(routers) == 4 and state.keys() == backbone.keys() | routers.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in {**backbone, **routers}.items())


@pytest.mark.parametrize(
    "card, license",
    [
        (None, None),
        ("---\nlicense: gemma\n---\n# A model", "gemma"),
        ("no metadata", None),
        ("---\n{[\n---", None),
    ],
)
def test_where_a_model_comes_from_is_noted_for_cards(tiny_tokenizer, tmp_path, monkeypatch, card, license):
    folder = tmp_path / "source"
    tiny_backbone("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    notes = json.loads((convert(folder, tmp_path / "local") / "msa_conversion.json").read_text())
    assert notes == {"license": license, "base_model": None}, "a local path says nothing to others"
    monkeypatch.setattr("msa_hf.conversion._download", lambda name, revision: folder)
    notes = json.loads((convert("maker/model", tmp_path / "hub") / "msa_conversion.json").read_text())
    assert notes == {"license": license, "base_model": "maker/model"}


def test_presets_name_packages_and_routers_that_exist(tmp_path):
    for name in presets("models"):
        fields = preset("models", name)
        assert fields.keys() == {"package", "base_model", "license", "routers", "memory"}
        assert fields["package"] in packages.PACKAGES
        assert fields["routers"] is None or (routers_folder(fields["routers"]) / SETTINGS_FILE).is_file()
        MSAConfig(**fields["memory"])
    with pytest.raises(ConversionError, match="routers/no-such"):
        convert(tmp_path, tmp_path / "converted", routers="no-such")
    with pytest.raises(ValueError, match="smollm2-135m"):
        preset("models", "no-such")
    with pytest.raises(ValueError, match="no-such"):
        presets("no-such")


def broken(folder, kind):
    """Damages a saved checkpoint in one way and returns what to convert."""
    config = json.loads((folder / "config.json").read_text())
    if kind == "architecture":
        config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    elif kind == "sliding window":
        config |= {"sliding_window": 32}
    elif kind == "quantised":
        config |= {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "config":
        (folder / "config.json").unlink()
    elif kind == "weights":
        (folder / "model.safetensors").unlink()
    elif kind == "pickled weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "shard":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "not gguf":
        return folder / "config.json"
    elif kind == "nowhere":
        return folder / "absent" / "model.gguf"
    elif kind == "offline hub id":
        return "no-such-organisation/no-such-model"
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("architecture", "model_type must be one of"),
        ("sliding window", "sliding_window must be off"),
        ("quantised", "is quantised"),
        ("config", "no config.json"),
        ("weights", "no model.safetensors"),
        ("pickled weights", "pickles"),
        ("shard", "lacks model-00002-of-00002.safetensors"),
        ("tokenizer", "no tokenizer"),
        ("not gguf", "neither a folder nor a GGUF file"),
        ("nowhere", "does not exist"),
        ("offline hub id", "check the name and the network"),
    ],
)
def test_what_cannot_be_converted_says_so_and_leaves_nothing(
    kind, message, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = broken(save(tiny_backbone("mistral"), tiny_tokenizer, tmp_path / "source"), kind)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_hub_id_fetches_weights_only_of_what_can_be_converted(tiny_tokenizer, tmp_path, monkeypatch):
    source = save(tiny_backbone("mistral"), tiny_tokenizer, tmp_path / "source")
    commit = tmp_path / "snapshots" / "0123abc"

    def hub(repository, revision, allow_patterns):
        assert repository == "some/model" and revision in ("main", commit.name)
        keep = {path for pattern in allow_patterns for path in source.glob(pattern)}
        commit.mkdir(parents=True, exist_ok=True)
        for path in keep:
            shutil.copy(path, commit)
        return str(commit)

    monkeypatch.setattr("msa_hf.conversion.snapshot_download", hub)
    folder = convert("some/model", tmp_path / "converted", revision="main", **MEMORY)
    assert AutoModelForCausalLM.from_pretrained(folder).config.backbone_type == "mistral"
    shutil.rmtree(commit)
    broken(source, "sliding window")
    with pytest.raises(ConversionError, match="sliding_window"):
        convert("some/model", tmp_path / "other", revision="main", **MEMORY)
    assert commit.is_dir() and not list(commit.glob("*.safetensors"))


def test_weights_of_another_shape_are_refused(tiny_tokenizer, tmp_path):
    source = save(tiny_backbone("llama"), tiny_tokenizer, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ConversionError, match="do not fit"):
        convert(source, tmp_path / "converted", router_layers=[1])
    assert not (tmp_path / "converted").exists()


def test_bad_memory_fields_are_named_before_any_work(tiny_tokenizer, tmp_path):
    source = save(tiny_backbone("llama"), tiny_tokenizer, tmp_path / "source")
    for fields, name in (({"router_layers": [7]}, "router_layers"), ({"chunk_size": 0}, "chunk_size")):
        with pytest.raises(ValueError, match=name):
            convert(source, tmp_path / "converted", **fields)
    assert not (tmp_path / "converted").exists()


def test_destination_is_never_overwritten(tiny_tokenizer, tmp_path):
    source = save(tiny_backbone("llama"), tiny_tokenizer, tmp_path / "source")
    kept = tmp_path / "kept"
    kept.mkdir()
    convert(source, kept, **MEMORY)  # an empty folder is fine
    before = (kept / "config.json").read_bytes()
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(source, kept, chunk_size=32)
    assert (kept / "config.json").read_bytes() == before
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(source, kept / "config.json")


def test_interrupted_conversion_leaves_nothing(tiny_tokenizer, tmp_path, monkeypatch):
    source = save(tiny_backbone("llama"), tiny_tokenizer, tmp_path / "source")

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(source)), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "converted", **MEMORY)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_from_pretrained_reads_a_backbone_folder_directly(tiny_tokenizer, tmp_path):
    source = save(tiny_backbone("qwen3"), tiny_tokenizer, tmp_path / "source")
    config = MSAConfig.from_backbone(AutoConfig.from_pretrained(source), **MEMORY)
    model = MSAForCausalLM.from_pretrained(source, config=config)
    ids = torch.arange(3, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_real_smollm2_from_gguf_equals_its_backbone(smollm2):
    """Logits within 1e-5; the same greedy, beam and left-padded batch tokens as Transformers' GGUF model."""
    file = packages.smollm2_gguf()
    original = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    converted = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    questions = ["What is the capital of France?", "Name three colours of a rainbow, one per line, please."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        converted(**batch).logits[real], original(**batch).logits[real], atol=1e-5, rtol=0
    )
    single = tokenizer(prompts[0], return_tensors="pt", add_special_tokens=False)
    for inputs, settings in ((batch, {}), (single, {"num_beams": 3})):
        tokens = [
            model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
            for model in (original, converted)
        ]
        assert torch.equal(*tokens)
    assert "Paris" in tokenizer.decode(tokens[1][0])
