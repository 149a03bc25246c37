"""Numbers of the reference implementation, run in float32 on a tiny random checkpoint in its own format."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.modeling.cache_memory import MemoryCache, MemoryReader
from msa_hf.modeling.interleave_msa import left_pad
from msa_hf.modeling.packed_msa import packed_forward
from msa_hf.modeling.prompts_msa import msa_prompt

FOLDER = Path(__file__).parent / "fixtures" / "official_msa"
TOLERANCE = 2e-4
ROUTERS = (2, 3)
REPORT = json.loads((FOLDER / "train_report.json").read_text())
TEXTS = json.loads((FOLDER / "docs.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "ckpt")


@pytest.fixture(scope="module")
def checkpoint():
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER / "ckpt", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.fixture
def model(checkpoint):
    return copy.deepcopy(checkpoint)


@pytest.fixture(scope="module")
def bank(checkpoint, tokenizer):
    return checkpoint.encode_memory(TEXTS["docs_P4"], tokenizer)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0, check_dtype=False)


def inputs(tensors, prefix):
    return {
        name: tensors[f"{prefix}.{name}"].long() for name in ("input_ids", "attention_mask", "position_ids")
    }


def test_the_checkpoint_loads_as_our_class_and_saves_as_our_type(model, tmp_path):
    assert isinstance(model, MSAForCausalLM) and type(model.config) is MSAConfig
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "memory_sparse_attention"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_pooled_memory_and_template_head(bank):
    expected = load_file(FOLDER / "infer_P4_stage1.safetensors")
    assert bank.chunk_counts.tolist() == expected["stage1.chunk_sizes"].tolist() == TEXTS["num_chunks_P4"]
    for layer in ROUTERS:
        for name, attribute in (("k", "keys"), ("v", "values"), ("router_k", "router_keys")):
            reference = expected[f"stage1.pooled_{name}.layer{layer}"][0].transpose(0, 1).flatten(1)
            close(getattr(bank.layers[layer], attribute).data, reference)
    for layer in range(4):
        for position, name in enumerate("kv"):
            close(bank.head[layer][position], expected[f"stage1.template_{name}.layer{layer}"][0])


def test_the_prompt_is_the_reference_prompt(tokenizer):
    expected = load_file(FOLDER / "infer_P4_stage2.safetensors")
    rows, labels = [], []
    for question in TEXTS["prompts"][:2]:
        parts = [
            (tokenizer(text, add_special_tokens=False)["input_ids"], label)
            for text, label in msa_prompt(question)
        ]
        rows.append(torch.tensor([token for ids, _ in parts for token in ids]))
        labels.append(torch.tensor([label for ids, label in parts for _ in ids]))
    ids, mask = left_pad(rows, tokenizer.pad_token_id, "cpu")
    assert torch.equal(mask, expected["batch2.in.attention_mask"].long())
    keep = mask.bool()
    assert torch.equal(ids[keep], expected["batch2.in.input_ids"].long()[keep])
    assert torch.equal(torch.cat(labels), expected["batch2.in.doc_ids"].long()[keep])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["batch2", "single0", "single1"])
def test_routing_selection_and_logits(model, bank, case, attention):
    expected = load_file(FOLDER / "infer_P4_stage2.safetensors")
    model.set_attn_implementation(attention)
    question = expected[f"{case}.in.doc_ids"] == 0
    with torch.no_grad():
        output = model(**inputs(expected, f"{case}.in"), memory=bank, question_mask=question)
    for layer in ROUTERS:
        selected = torch.stack(output.selected_documents[layer])
        assert torch.equal(selected, expected[f"{case}.out.topk_doc_ids.layer{layer}"].long())
        close(
            output.document_scores[layer].gather(1, selected),
            expected[f"{case}.out.topk_scores.layer{layer}"],
        )
        if case == "batch2":
            close(output.document_scores[layer], expected[f"{case}.out.all_doc_scores.layer{layer}"])
            keys, values, mask = bank.gather(layer, list(selected))
            assert mask.sum(1).tolist() == expected[f"{case}.out.num_selected_chunks.layer{layer}"].tolist()
            for states, name in ((keys, "k"), (values, "v")):
                flat = torch.cat([row[:, keep] for row, keep in zip(states, mask)], dim=1)
                close(flat, expected[f"{case}.out.selected_{name}.layer{layer}"])
    if case == "batch2":
        keep = expected["batch2.in.attention_mask"][:, -40:].bool()
        close(output.logits[:, -40:][keep], expected["batch2.out.prefill_logits_last40"][keep])
    close(output.logits[:, -1], expected[f"{case}.out.step_logits"][:, 0])


@pytest.mark.parametrize("case", ["batch2", "single0", "single1"])
def test_greedy_steps(model, bank, case):
    expected = load_file(FOLDER / "infer_P4_stage2.safetensors")
    given = inputs(expected, f"{case}.in")
    result = model.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        question_mask=expected[f"{case}.in.doc_ids"] == 0,
        past_key_values=MemoryCache(MemoryReader(bank, model.config)),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(result.sequences[:, -6:], expected[f"{case}.out.greedy_tokens"].long())
    close(torch.stack(result.logits, 1), expected[f"{case}.out.step_logits"][:, :6])


def packed(model, tensors, report="T1", **labels):
    given = {
        name: tensors[f"in.{name}"].long()
        for name in ("input_ids", "attention_mask", "position_ids", "doc_ids")
    }
    return model(
        **given, labels=tensors["in.labels"].long(), batch_aux_labels=REPORT[report]["aux_labels"], **labels
    )


def test_training_form_losses_scores_and_gradients(model):
    tensors, report = load_file(FOLDER / "train_T1_p4_multiple.safetensors"), REPORT["T1"]
    names = ("batch_answer_labels", "batch_reconstruction_labels", "train_qa_samples")
    output = packed(model.train(), tensors, **{name: tensors[f"in.{name}"].long() for name in names})
    for name in ("loss", "lm_loss", "aux_loss", "answer_loss", "reconstruction_loss"):
        assert getattr(output, name).item() == pytest.approx(report["losses"][name], abs=TOLERANCE), name
    assert output.router_metrics == pytest.approx(report["losses"]["router_metrics"])
    rows, columns = tensors["active_index"].long().unbind(1)
    close(output.logits[rows, columns], tensors["out.logits_active"])
    for layer in ROUTERS:
        close(output.document_scores[layer], tensors[f"out.doc_scores.layer{layer}"])
        assert [ids.tolist() for ids in output.selected_documents[layer]] == report["selected"][str(layer)]
    output.loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(report["grad_norms"], abs=TOLERANCE)
    for name in (name for name in tensors if name.startswith("grad.")):
        _, layer, projection = name.split(".")
        module = getattr(model.model.layers[int(layer.removeprefix("layer"))].self_attn, projection)
        weight = module[0].weight if "router" in projection else module.weight
        close(weight.grad, tensors[name])


def test_hidden_states_of_the_training_form(model):
    tensors = load_file(FOLDER / "train_T1_p4_multiple.safetensors")
    given = {
        name: tensors[f"in.{name}"].long()
        for name in ("input_ids", "attention_mask", "position_ids", "doc_ids")
    }
    states = packed_forward(model.model.train(), **given).last_hidden_state
    rows, columns = tensors["active_index"].long().unbind(1)
    close(states[rows, columns], tensors["out.last_hidden_state"][rows, columns])
    documents = (given["doc_ids"] > 0) & given["attention_mask"].bool()
    close(states[documents], tensors["out.last_hidden_state"][documents])


def test_hidden_states_inside_the_training_form(model):
    """What layer 2 gives for the document rows and for the active rows, put back into the packed row."""
    tensors = load_file(FOLDER / "train_T1_p4_multiple.safetensors")
    names = ("input_ids", "attention_mask", "position_ids", "doc_ids")
    given = {name: tensors[f"in.{name}"].long() for name in names}
    outputs = []
    model.model.layers[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    packed_forward(model.model.train(), **given)
    expected, real = tensors["out.hidden_after_layer2"], given["attention_mask"].bool()
    documents = [
        (given["doc_ids"][b] == i) & real[b] for b in range(2) for i in given["doc_ids"][b].unique() if i > 0
    ]
    owners = [b for b in range(2) for i in given["doc_ids"][b].unique() if i > 0]
    for row, mask, b in zip(outputs[0], documents, owners):
        close(row[: mask.sum()], expected[b][mask])
    for b in range(2):
        active = (given["doc_ids"][b] < 1) & real[b]
        close(outputs[1][b, : active.sum()], expected[b][active])


def test_hidden_states_of_the_encoded_memory(checkpoint):
    expected = load_file(FOLDER / "infer_P4_stage1.safetensors")
    ids, labels = expected["stage1.in.input_ids"][0].long(), expected["stage1.in.doc_ids"][0]
    states = []
    for label in labels.unique_consecutive()[:5]:  # template head, then documents: more than 64 tokens
        with torch.no_grad():
            states.append(checkpoint.model.encode(ids[labels == label][None], lambda *_: None, full=True)[0])
    close(torch.cat(states)[:64], expected["stage1.last_hidden_state_first64"][0])


FIELDS = {
    "head_reduce_method": "head_reduction",
    "query_reduce_method": "query_reduction",
    "chunk_reduce_method": "chunk_reduction",
    "rewrite_position": "rewrite_positions",
}


@pytest.mark.parametrize("variant", list(REPORT["T1_variants"]))
def test_training_form_variants(variant):
    settings = json.loads((FOLDER / "ckpt" / "config.json").read_text())
    if variant.startswith("{"):
        settings["msa_config"].update(json.loads(variant))
    else:
        settings["msa_config"]["aux_loss_method"] = variant
    model = MSAForCausalLM.from_pretrained(FOLDER / "ckpt", config=MSAConfig.from_dict(settings)).train()
    expected = REPORT["T1_variants"][variant]
    output = packed(model, load_file(FOLDER / "train_T1_p4_multiple.safetensors"))
    for name in ("loss", "lm_loss", "aux_loss"):
        assert getattr(output, name).item() == pytest.approx(expected["losses"][name], abs=TOLERANCE), name
    assert output.router_metrics == pytest.approx(expected["losses"]["router_metrics"])
    for layer in ROUTERS:
        close(output.document_scores[layer], torch.tensor(expected["scores"][str(layer)]))
        assert [ids.tolist() for ids in output.selected_documents[layer]] == expected["selected"][str(layer)]


@pytest.mark.parametrize("samples", ["all", "none"])
def test_answer_loss_counts_only_the_samples_asked_for(model, samples):
    tensors = load_file(FOLDER / "train_T1_p4_multiple.safetensors")
    counted = tensors["in.train_qa_samples"].long() * (samples == "all")
    output = packed(
        model.train(),
        tensors,
        batch_answer_labels=tensors["in.batch_answer_labels"].long(),
        train_qa_samples=counted,
    )
    losses = REPORT["T1"]["losses" if samples == "all" else "losses_train_qa_samples_all_zero"]
    assert output.loss.item() == pytest.approx(losses["loss"], abs=TOLERANCE)


def test_training_and_inference_agree(model, tokenizer):
    bank = model.encode_memory(TEXTS["docs_even_P4"], tokenizer)
    expected = load_file(FOLDER / "train_equals_infer_P4.safetensors")
    ids, positions, labels = (
        expected[f"in.{name}"].long() for name in ("input_ids", "position_ids", "doc_ids")
    )
    with torch.no_grad():
        output = model(ids, position_ids=positions, memory=bank, question_mask=labels == 0)
    for layer in ROUTERS:
        close(output.document_scores[layer][0], expected[f"infer_doc_scores.layer{layer}"])
        close(output.document_scores[layer][0], expected[f"train_doc_scores.layer{layer}"])
    close(output.logits[:, -40:], expected["infer_prefill_logits_last40"])
    close(output.logits[:, -40:], expected["train_mode_logits_over_prompt_last40"])


def test_another_loss_on_the_same_scores_says_what_the_reference_infers_with(caplog):
    settings = json.loads((FOLDER / "ckpt" / "config_infonce_decouple.json").read_text())
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        config = MSAConfig.from_dict(settings)
    finally:
        logger.removeHandler(caplog.handler)
    assert config.score_normalization == "cosine" and "raw dot products" in caplog.text
    assert AutoConfig.from_pretrained(FOLDER / "ckpt", score_normalization="dot").score_normalization == "dot"
