"""The reference's layout both ways: what is converted gives its numbers, exports are its files."""

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_reference import FOLDER, REPORT, ROUTERS, TEXTS, close, inputs, packed
from tiny_models import DOCUMENTS, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from msa_hf import MSAConfig, commands
from msa_hf.cli import main
from msa_hf.conversion import convert, export_reference, open_score_normalization
from msa_hf.modeling.errors import ConversionError
from msa_hf.training.adapter import router_weights, save_router_adapter

CHECKPOINT = FOLDER / "ckpt"
CONFIGS = ("config.json", "config_infonce_decouple.json", "config_p64.json")
OPEN, OPEN_LOSS = "config_infonce_decouple.json", "INFONCE_DECOUPLE"


def reference(folder, config="config.json", **memory):
    """The fixture's checkpoint with one of its configs, some fields of msa_config replaced."""
    folder.mkdir()
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    fields = json.loads((CHECKPOINT / config).read_text())
    fields["msa_config"].update(memory)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(CHECKPOINT, tmp_path_factory.mktemp("converted") / "own")


def test_a_converted_checkpoint_gives_the_reference_numbers(converted):
    """Scores, selections and logits of the inference form, loaded from our own layout."""
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    assert type(model.config) is MSAConfig and model.config.score_normalization == "cosine"
    bank = model.encode_memory(TEXTS["docs_P4"], AutoTokenizer.from_pretrained(converted))
    expected = load_file(FOLDER / "infer_P4_stage2.safetensors")
    with torch.no_grad():
        question = expected["batch2.in.doc_ids"] == 0
        output = model(**inputs(expected, "batch2.in"), memory=bank, question_mask=question)
    for layer in ROUTERS:
        selected = torch.stack(output.selected_documents[layer])
        assert torch.equal(selected, expected[f"batch2.out.topk_doc_ids.layer{layer}"].long())
        close(output.document_scores[layer], expected[f"batch2.out.all_doc_scores.layer{layer}"])
    keep = expected["batch2.in.attention_mask"][:, -40:].bool()
    close(output.logits[:, -40:][keep], expected["batch2.out.prefill_logits_last40"][keep])


@pytest.mark.parametrize("normalization, variant", [("cosine", "INFONCE_DECOUPLE"), ("dot", "BCE")])
@pytest.mark.parametrize("when", ["converted", "loaded"])
def test_both_normalisations_give_the_reference_scores(normalization, variant, when, converted, tmp_path):
    """The reference trains BCE on raw dot products, everything else on cosines; both on the same weights."""
    chosen = {"score_normalization": normalization}
    if when == "converted":
        folder = convert(reference(tmp_path / "source", OPEN), tmp_path / "own", **chosen)
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(converted, **chosen)
    output = packed(model.train(), load_file(FOLDER / "train_T1_p4_multiple.safetensors"))
    expected = REPORT["T1_variants"][variant]
    for layer in ROUTERS:
        close(output.document_scores[layer], torch.tensor(expected["scores"][str(layer)]))
        selected = [ids.tolist() for ids in output.selected_documents[layer]]
        assert selected == expected["selected"][str(layer)]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_are_the_same_files(config, tmp_path):
    source = reference(tmp_path / "source", config)
    folder = export_reference(convert(source, tmp_path / "own"), tmp_path / "back")
    assert fields_of(folder) == fields_of(source)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, CHECKPOINT))
    same = ("additional_special_tokens", "eos_token", "pad_token", "model_max_length")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in ours
    again, first = (AutoTokenizer.from_pretrained(f) for f in (folder, CHECKPOINT))
    text = "<|im_start|>[3]. Ada<|object_ref_end|> lived in 1843.<|im_end|>"
    assert again(text).input_ids == first(text).input_ids and len(again(text).input_ids) > 10
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [259, 260] and settings["pad_token_id"] == 260


@pytest.mark.parametrize("layers", [[2, 3], [3]])
def test_an_adapter_replaces_the_routers_of_the_reference(layers, converted, tmp_path):
    """All of them: of a layer that the adapter leaves out, none is left."""
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.config.router_layers = layers
    routers = {name: tensor.detach().normal_() for name, tensor in router_weights(model).items()}
    save_router_adapter(model, tmp_path / "adapter")
    source = reference(tmp_path / "source")
    own = convert(source, tmp_path / "own", routers=tmp_path / "adapter")
    found = load_file(own / "model.safetensors")
    kept = {
        name: own for name, own in load_file(source / "model.safetensors").items() if "router" not in name
    }
    kept.pop("temperature")
    assert found.keys() == kept.keys() | routers.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in {**kept, **routers}.items())
    exported = export_reference(own, tmp_path / "exported")
    assert fields_of(exported)["msa_config"]["router_layer_idx"] == ",".join(map(str, layers))


def test_values_that_our_config_does_not_hold_come_back(tmp_path):
    """And those that it holds are its own: what was changed after the conversion is what is exported."""
    source = reference(
        tmp_path / "source", decouple_pooling_mode="mean", aux_loss=False, lmloss_weigth=0.5, further="kept"
    )
    tensors = load_file(source / "model.safetensors")
    tensors["temperature"] = torch.tensor([0.07], dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    own = convert(source, tmp_path / "own", top_k_documents=5)
    folder = export_reference(own, tmp_path / "same")
    expected = fields_of(source)
    expected["msa_config"]["top_k_docs"] = 5
    assert fields_of(folder) == expected
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(own.dtype == tensors[n].dtype and torch.equal(own, tensors[n]) for n, own in found.items())
    config = MSAConfig.from_pretrained(own)
    config.aux_temperature, config.aux_loss_weight, config.router_layers = 0.2, 0.3, [2, 3]
    config.save_pretrained(own)
    changed = export_reference(own, tmp_path / "changed")
    memory = fields_of(changed)["msa_config"]
    assert (memory["infonce_loss_temp"], memory["auxloss_weight"], memory["lmloss_weigth"]) == (0.2, 0.3, 0.5)
    temperature = load_file(changed / "model.safetensors")["temperature"]
    assert temperature.shape == () and temperature.dtype == torch.float32
    assert temperature.item() == pytest.approx(0.2)


SECTION_5 = (
    "router_layer_idx top_k_docs pooling_kernel_size decouple_router head_reduce_method query_reduce_method "
    "chunk_reduce_method decouple_pooling_mode aux_loss aux_loss_method infonce_loss_temp lmloss_weigth "
    "auxloss_weight recloss_weight ansloss_weight rewrite_position"
).split()
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "defaults": {},
    "dot": {"score_normalization": "dot"},
    "another loss": {"aux_loss_method": "INFONCE", "aux_temperature": 0.05, "lm_loss_weight": 0.1},
    "bce": {"aux_loss_method": "BCE", "score_normalization": "dot"},
    "coupled": {"separate_router": False, "head_reduction": "max", "chunk_reduction": "mean"},
    "every layer": {"router_layers": [0, 1, 2], "query_reduction": "last", "top_k_documents": 2},
    "yarn": {"rope_parameters": YARN, "tie_word_embeddings": True, "rewrite_positions": False},
}


@torch.no_grad()
@pytest.mark.parametrize("case", MODELS)
def test_a_model_made_here_loads_from_its_export(case, tiny_tokenizer, tmp_path):
    """The same weights, and with a memory the same scores, selections and logits, to the bit."""
    torch.manual_seed(3)
    fields = {"router_chunk_size": 8, "prompt_format": "msa", "retrieval": "generative", **MODELS[case]}
    model = tiny_model("qwen3", **fields)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    own = tmp_path / "own"
    model.save_pretrained(own, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(own)
    folder = export_reference(own, tmp_path / "exported", max_shard_size="40KB")
    written = fields_of(folder)
    assert written["model_type"] == "msa" and written["architectures"] == ["MSAForCausalLM"]
    assert sorted(written["msa_config"]) == sorted(SECTION_5)
    layers = written["msa_config"]["router_layer_idx"]
    assert layers == ("all" if case == "every layer" else "1,2")
    assert written["rope_theta"] == 1e4 and written["torch_dtype"] == "float32"
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert names.keys() == model.state_dict().keys() - tied | {"temperature"}
    again, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, score_normalization=model.config.score_normalization
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(own, state[name]) for name, own in model.state_dict().items())
    ids = torch.arange(3, 40)[None]
    banks = [own.eval().encode_memory(DOCUMENTS, tiny_tokenizer) for own in (model, again)]
    before, after = (own(ids, memory=bank) for own, bank in zip((model, again), banks))
    assert torch.equal(before.logits, after.logits) and before.logits.std() > 0.1
    for layer in model.config.router_layers:
        assert torch.equal(before.document_scores[layer], after.document_scores[layer])
        assert torch.equal(before.selected_documents[layer][0], after.selected_documents[layer][0])
    for name, value in fields.items():
        if name != "rope_parameters":
            assert getattr(again.config, name) == value, name


REFUSED = {
    "backbone": ("llama", {}, r"backbone_type must be 'qwen3'; got 'llama'"),
    "router chunks": ("qwen3", {"router_chunk_size": 4}, r"router_chunk_size must be 8; got 4"),
    "maxsim": ("qwen3", {"query_reduction": "maxsim"}, r"'max' or 'mean' or 'last'; got 'maxsim'"),
    "keys alone": ("qwen3", {"score_normalization": "key"}, r"must be 'cosine' or 'dot'; got 'key'"),
    "dot": (
        "qwen3",
        {"score_normalization": "dot", "aux_loss_method": "INFONCE"},
        r"score_normalization must be 'cosine'; got 'dot'",
    ),
    "bce": ("qwen3", {"aux_loss_method": "BCE"}, r"score_normalization must be 'dot'; got 'cosine'"),
    "consensus": ("qwen3", {"consensus_weights": [1.0, 2.0]}, r"consensus_weights must be None"),
    "no router": ("qwen3", {"router_layers": []}, r"router_layers must name a layer"),
    "bias": ("qwen3", {"mlp_bias": True}, r"mlp_bias must be False; got True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_reference_cannot_hold_is_named_before_any_work(case, tiny_tokenizer, tmp_path):
    kind, fields, message = REFUSED[case]
    tiny_model(kind, **{"router_chunk_size": 8, **fields}).save_pretrained(tmp_path / "own")
    tiny_tokenizer.save_pretrained(tmp_path / "own")
    with pytest.raises(ConversionError, match=message):
        export_reference(tmp_path / "own", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def damaged(folder, kind):
    """Makes a converted model one that cannot be exported."""
    if kind == "tokenizer":
        (folder / "tokenizer_config.json").unlink()
    elif kind == "weights":
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.layers.2.self_attn.router_k_proj.0.weight")
        save_file(tensors, folder / "model.safetensors")
    elif kind == "notes":
        (folder / "msa_conversion.json").write_text("{")
    elif kind == "config":
        (folder / "config.json").unlink()
    elif kind == "reference":
        return CHECKPOINT
    elif kind == "loss":
        return {"aux_loss_method": "MSE"}
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("tokenizer", "has no tokenizer"),
        ("weights", r"missing \['model\.layers\.2\.self_attn\.router_k_proj\.0\.weight'\]"),
        ("notes", r"msa_conversion\.json is damaged"),
        ("config", "must be the folder of a converted model"),
        ("reference", "in the reference's layout already"),
        ("loss", "aux_loss_method must be one of INFONCE"),
    ],
)
def test_what_cannot_be_exported_says_so_and_leaves_nothing(kind, message, converted, tmp_path):
    own = Path(shutil.copytree(converted, tmp_path / "own"))
    found = damaged(own, kind)
    given = found if isinstance(found, dict) else {}
    with pytest.raises(ConversionError, match=message):
        export_reference(own if given else found, tmp_path / "exported", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with pytest.raises(ConversionError, match="not an empty folder"):
        export_reference(converted, own)


def test_a_damaged_reference_checkpoint_is_named(tmp_path):
    source = reference(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: own for name, own in tensors.items() if "3.self_attn.router_q" not in name},
        source / "model.safetensors",
    )
    with pytest.raises(ConversionError, match=r"missing \['model\.layers\.3\.self_attn\.router_q_proj"):
        convert(source, tmp_path / "own")  # routers that were trained are never drawn anew
    fields = fields_of(source)
    fields.pop("msa_config")
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match=r'must hold msa_config beside model_type "msa"; got None'):
        convert(source, tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_taken_and_what_is_left_out_is_said(tmp_path, caplog):
    source = reference(tmp_path / "source", OPEN, decouple_pooling_mode="max")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        own = convert(source, tmp_path / "own")
        assert 'score_normalization="cosine" is taken' in caplog.text and "INFONCE_DECOUPLE" in caplog.text
        assert "--score-normalization dot" in caplog.text and "decouple_pooling_mode='max'" in caplog.text
        assert caplog.text.count("raw dot products") == 1, "said once"
        caplog.clear()
        dot = convert(source, tmp_path / "dot", score_normalization="dot")
        assert "is taken" not in caplog.text and "raw dot products" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    for folder, said in ((own, True), (dot, False)):
        caplog.clear()
        export_reference(folder, tmp_path / f"exported-{folder.name}")
        assert ("export with aux_loss_method INFONCE" in caplog.text) is said
    caplog.clear()
    exported = export_reference(own, tmp_path / "infonce", aux_loss_method="INFONCE")
    assert not caplog.text and fields_of(exported)["msa_config"]["aux_loss_method"] == "INFONCE"
    assert open_score_normalization(exported) is None and open_score_normalization(source) == OPEN_LOSS
    config = MSAConfig.from_pretrained(own)
    config.prompt_format, config.routers_trained = "chat", False
    config.save_pretrained(own)
    export_reference(own, tmp_path / "chat", aux_loss_method="INFONCE")
    assert "has no place for prompt_format='chat'" in caplog.text and "untrained" in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "typed, given, config, expected, asked",
    [
        ("dot\n", [], OPEN, "dot", 1),
        ("\n", [], OPEN, "cosine", 1),
        ("what?\nCOSINE\n", [], OPEN, "cosine", 2),
        ("", ["--score-normalization", "dot"], OPEN, "dot", 0),
        ("", [], "config.json", "cosine", 0),
    ],
)
def test_the_command_asks_where_scores_are_open(
    typed, given, config, expected, asked, tmp_path, monkeypatch, capsys
):
    source = reference(tmp_path / "source", config)
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert main(["convert", str(source), str(tmp_path / "own"), "--json", *given]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["routers_trained"] is True
    assert captured.err.count("cosine or dot: ") == asked
    assert ("trained with INFONCE_DECOUPLE" in captured.err) == bool(asked)
    assert MSAConfig.from_pretrained(tmp_path / "own").score_normalization == expected


def test_nothing_is_asked_without_a_terminal_and_of_other_sources(
    tmp_path, monkeypatch, capsys, tiny_tokenizer
):
    source = reference(tmp_path / "source", OPEN)
    monkeypatch.setattr(sys, "stdin", io.StringIO("dot\n"))
    assert main(["convert", str(source), str(tmp_path / "own")]) == 0
    assert 'score_normalization="cosine" is taken' in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with monkeypatch.context() as offline:
        offline.setattr("msa_hf.conversion._download", lambda *_, **__: pytest.fail("fetched something"))
        for other in ("smollm2-135m", file):
            assert open_score_normalization(other) is None
    monkeypatch.setattr(commands, "_say", lambda text: pytest.fail("asked"))
    arguments = ["convert", str(source), str(tmp_path / "no"), "--routers", str(tmp_path / "absent")]
    assert main(arguments) == 1, "an adapter says how its routers score"
    assert main(["convert", str(tmp_path / "nothing" / "here.gguf"), str(tmp_path / "no")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_command_exports(converted, tmp_path, capsys):
    arguments = ["export-reference", str(converted), str(tmp_path / "out"), "--max-shard-size", "300KB"]
    assert main([*arguments, "--aux-loss-method", "INFONCE_DECOUPLE", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"checkpoint": str(tmp_path / "out")}
    assert "raw dot products" in captured.err and len(list((tmp_path / "out").glob("model-*"))) == 3
    assert main(arguments) == 1 and "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export-reference", "--help"])
    assert "examples:\n  msa-hf export-reference" in capsys.readouterr().out


def test_a_hub_id_is_converted_and_small_files_come_first(tmp_path):
    """In a process of its own, from a Hub that speaks its API: weights come after the config."""
    source = reference(tmp_path / "source", OPEN)
    script = (
        "import os, pathlib, sys; from msa_hf.cli import main\n"
        "from msa_hf.conversion import open_score_normalization\n"
        "print(open_score_normalization('maker/msa'))\n"
        "print(list(pathlib.Path(os.environ['HF_HOME']).rglob('*.safetensors')), flush=True)\n"
        "sys.exit(main(['convert', 'maker/msa', sys.argv[1]]))"
    )
    with HubServer(tmp_path / "hub") as hub:
        files = {path.name: path.read_bytes() for path in source.iterdir()}
        hub.add("maker/msa", files | {"pytorch_model.bin": b"pickle"})
        environment = hub.environment(tmp_path / "home", token=None)
        environment |= {"PYTHONPATH": str(FOLDER.parents[2]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "own"], capture_output=True, text=True, env=environment
        )
        asked = [request.path for request in hub.requests]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[:2] == [OPEN_LOSS, "[]"], "asked from small files alone"
    resolved = [path for path in asked if "/resolve/" in path]
    weights = [number for number, path in enumerate(resolved) if path.endswith("model.safetensors")]
    small = [number for number, path in enumerate(resolved) if path.endswith(".json")]
    assert weights and small and min(weights) > max(small) and not any("pytorch_model" in p for p in resolved)
    notes = json.loads((tmp_path / "own" / "msa_conversion.json").read_text())
    assert notes["base_model"] == "maker/msa" and notes["reference"]["config"] == fields_of(source)
    folder = export_reference(tmp_path / "own", tmp_path / "back")
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
