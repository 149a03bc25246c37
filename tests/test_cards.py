"""Cards say what is known, parse as huggingface_hub's own, and their code runs when it is pasted."""

import json
import shutil
from pathlib import Path

import code_blocks
import pytest
import torch
from backbones import tiny_backbone
from hub_server import hub_of_this_process
from huggingface_hub import DatasetCard, ModelCard
from tiny_models import DOCUMENTS, MEMORY, tiny_model

from msa_hf import MemoryStore, MSAForCausalLM, hub
from msa_hf.card_facts import CardError, fingerprint_of
from msa_hf.cards import adapter_card, kernel_card, memory_card, model_card
from msa_hf.configs import preset, routers_folder
from msa_hf.conversion import convert
from msa_hf.training.adapter import save_router_adapter

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {name: value for name, value in MEMORY.items() if name not in ("routers_trained", "answer_style")}


@pytest.fixture(scope="module")
def backbone(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    """A converted model whose routers are not trained."""
    return convert(backbone, tmp_path_factory.mktemp("converted") / "model", **SETTINGS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_router_adapter(tiny_model(), folder)
    return folder


@pytest.fixture
def store(folder, tiny_tokenizer, tmp_path):
    model = MSAForCausalLM.from_pretrained(folder)
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        store.add([text for text in DOCUMENTS if text])
        yield store


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        yield server


def blocks(card):
    """The Python code; a card has no other."""
    found = code_blocks.blocks_of(ModelCard(str(card)).text)
    assert {block.language for block in found} == {"python"}
    return [block.text for block in found]


def paste(code, server, folder, **variables):
    """What the code prints in an empty folder, with the server as its Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    own = server.environment(folder.parent / "home") | variables
    return code_blocks.paste(code, folder, code_blocks.environment_of(**own))


def test_model_card_says_what_is_known(folder):
    card = model_card(folder, "user/model", base_model="maker/backbone", license="mit")
    data = ModelCard(str(card)).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "maker/backbone" and data["base_model_relation"] == "finetune"
    assert data["license"] == "mit" and "arxiv:2603.23516" in data["tags"]
    text = card.text
    weights = sum(tensor.numel() for tensor in MSAForCausalLM.from_pretrained(folder).parameters())
    assert f"{weights:,} in F32" in text and "1, 2 route" in text
    assert "**not trained**" in text and "routing alone picks documents by chance" in text
    assert "Not measured." in text and "MiniMax Sparse Attention" in text and "may move" in text


def test_what_nobody_noted_is_unknown(folder, adapter):
    for card in (model_card(folder), adapter_card(adapter)):
        data = card.data.to_dict()
        assert data["license"] == "unknown" and "base_model" not in data
        assert "was not noted" in card.text


def test_notes_of_a_conversion_are_carried_over(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "msa_conversion.json").unlink()
    (copy / "README.md").write_text("---\nlicense: llama3.2\nbase_model: maker/other\n---\n# Model\n")
    data = model_card(copy).data.to_dict()
    assert (data["license"], data["base_model"]) == ("llama3.2", "maker/other")
    (copy / "msa_conversion.json").write_text('{"base_model": "maker/backbone", "license": "gemma"}')
    data = model_card(copy).data.to_dict()
    assert (data["license"], data["base_model"]) == ("gemma", "maker/backbone")
    assert model_card(copy, license="mit").data.license == "mit"
    (copy / "msa_conversion.json").unlink()
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CardError, match="cannot be read"):
        model_card(copy)


def test_shipped_routers_and_their_model_are_recognised(smollm2):
    measured = preset("measured", "smollm2-135m")
    fingerprint = MSAForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).fingerprint()
    assert fingerprint == fingerprint_of(smollm2, ["model.safetensors"]) == measured["fingerprint"]
    for card in (model_card(smollm2), adapter_card(routers_folder("smollm2-135m"))):
        data = card.data.to_dict()
        assert data["license"] == "apache-2.0" and data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert "2026-11-20, 2 CPU cores" in card.text and "0.863 [0.847, 0.878]" in card.text
    assert "6,196 questions, 24,229 documents." in card.text and "| consensus | 0.448 |" in card.text


def test_measured_figures_are_those_of_the_benchmarks():
    text = (ROOT / "BENCHMARKS.md").read_text()
    measured = preset("measured", "smollm2-135m")
    assert measured["date"] in text
    for table in measured["tables"]:
        for row in table["rows"]:
            assert any(all(cell in line for cell in row) for line in text.splitlines()), row


def test_another_model_is_not_called_measured(smollm2, tmp_path):
    model = MSAForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        model.model.layers[4].self_attn.router_q_proj[0].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert "Not measured." in model_card(tmp_path).text


def test_memory_card_of_a_store_and_of_its_export(store, tmp_path):
    store.export_to(tmp_path / "export")
    of_store, of_export = memory_card(store, "user/memory"), memory_card(tmp_path / "export", "user/memory")
    assert of_store.data.to_dict() == of_export.data.to_dict()
    assert of_export.data.license == "unknown" and of_export.data.size_categories == "n<1K"
    for text in (of_store.text, of_export.text):
        assert f"| documents | {len(store)} |" in text and "default (6)" in text
        assert store.provenance.fingerprint["backbone"] in text and "keys 4, values 4" in text
        assert "runs nothing" in text
    with pytest.raises(CardError, match="no export"):
        memory_card(tmp_path)


def test_cards_pass_the_check_of_the_hub(folder, adapter, store, server):
    memory = memory_card(store, license="cc0-1.0")
    for card in (model_card(folder), adapter_card(adapter), memory, kernel_card()):
        assert type(card)(str(card)).data.to_dict() == card.data.to_dict()
        card.validate()
        assert server.requests[-1].status == 200
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: no such thing\n---\n").validate()


def test_kinds_of_folders_are_told_apart(folder, adapter, tmp_path):
    for write, place in ((model_card, adapter), (adapter_card, folder), (model_card, tmp_path)):
        with pytest.raises(CardError):
            write(place)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CardError, match="'llama'"):
        model_card(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CardError, match=r"model\.safetensors"):
        model_card(tmp_path)


def test_code_of_the_model_card_runs(folder, server, tmp_path):
    hub.send(hub.plan_model(folder, "user/model"))
    [code] = blocks(server.files("user/model")["README.md"].decode())
    # The package must not be there: a name that fails to import stands before the real one.
    printed = paste(
        "import sys; sys.modules['msa_hf'] = None\n" + code, server, tmp_path / "here", PYTHONPATH=""
    )
    assert printed.count("\n") >= 2 and "[(" in printed
    assert "Do you wish" not in printed, "nobody is asked what the card has answered"


def test_code_of_the_adapter_card_runs(adapter, backbone, server, tmp_path):
    server.add("maker/backbone", {path.name: path.read_bytes() for path in backbone.iterdir()})
    hub.send(hub.plan_adapter(adapter, "user/routers", base_model="maker/backbone"))
    merged, by_peft = blocks(server.files("user/routers")["README.md"].decode())
    check = """
import torch
from msa_hf import MSAForCausalLM
there = MSAForCausalLM.from_pretrained("./model-with-memory").fingerprint()
assert model.base_model.model.fingerprint() == there, (there, model.base_model.model.fingerprint())
print(there["routers"])
"""
    printed = paste(merged + by_peft + check, server, tmp_path / "here")
    assert printed.splitlines()[-1] == tiny_model().fingerprint()["routers"]


def test_code_of_the_memory_card_runs(folder, store, server, tmp_path):
    hub.send(hub.plan_model(folder, "user/model"))
    hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export", model="user/model"))
    alone, asked = blocks(server.files("user/memory", "dataset")["README.md"].decode())
    printed = paste(alone + asked, server, tmp_path / "here")
    assert printed.startswith("6 ['default'] []\n")


def test_code_of_a_memory_card_names_other_namespaces(folder, tiny_tokenizer, server, tmp_path):
    model = MSAForCausalLM.from_pretrained(folder)
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        store.add(["A few words of it's own."], ids=["one"], namespace='it\'s "quoted"')
        hub.send(hub.plan_memory(store, "user/memory", tmp_path / "export", model="user/model"))
    hub.send(hub.plan_model(folder, "user/model"))
    alone, asked = blocks(server.files("user/memory", "dataset")["README.md"].decode())
    assert "[('one', " in paste(alone + asked, server, tmp_path / "here")


def test_memory_card_is_one_of_a_dataset(store):
    card = memory_card(store)
    assert DatasetCard(str(card)).data.to_dict()["configs"] == [
        {"config_name": "default", "data_files": "documents.jsonl"}
    ]
