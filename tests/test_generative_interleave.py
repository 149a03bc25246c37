"""Generative interleave in the reference's prompt format: what every round prefills, routes with and
injects."""

import json

import pytest
import torch
from test_reference import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer

from msa_hf.modeling.interleave_msa import generative_interleave

DOCUMENTS = json.loads((FOLDER / "docs.json").read_text())["docs_P4"]
PROMPT = (
    "\nPlease answer the question based on the above historical document information\n\n{question}\n"
    "Please return all documents related to the question\n<|im_end|>\n<|im_start|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "ckpt")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "ckpt").eval()


@pytest.fixture(scope="module")
def bank(model, tokenizer):
    return model.encode_memory(DOCUMENTS, tokenizer)


def scripted(model, tokenizer, monkeypatch, *scripts):
    """model.generate that writes each sample's next line of its script and records what it was given."""
    calls, remaining = [], {}
    routed = model.generate

    def generate(ids, *, attention_mask, question_mask, past_key_values, **options):
        lines = []
        with torch.no_grad():
            model(
                ids,
                attention_mask=attention_mask,
                question_mask=question_mask,
                past_key_values=past_key_values,
            )
        for row, keep, routes in zip(ids, attention_mask.bool(), question_mask):
            text = tokenizer.decode(row[keep])
            calls.append((text, tokenizer.decode(row[routes & keep])))
            script = next(lines for question, lines in scripts if question in text)
            turn = remaining.get(id(script), 0)
            remaining[id(script)] = turn + 1
            lines.append(torch.tensor(tokenizer(script[turn], add_special_tokens=False)["input_ids"]))
        tail = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([ids, tail], dim=1)

    assert callable(routed)
    monkeypatch.setattr(model, "generate", generate)
    return calls


def test_two_hops_then_the_answer(model, bank, tokenizer, monkeypatch):
    question = "Who found Pluto and when?"
    script = (
        question,
        [
            "[8][1]<|object_ref_end|>",
            "[0]<|object_ref_end|>",
            "<End-of-Retrieve>",
            "The answer to the question is: Tombaugh, 1930<|im_end|>",
        ],
    )
    calls = scripted(model, tokenizer, monkeypatch, script)
    result = generative_interleave(model, [question], bank, tokenizer)
    start = PROMPT.format(question=question)
    first = f"[1]. {DOCUMENTS[1]}\n[8]. {DOCUMENTS[8]}\n<|object_ref_end|>"
    second = f"[0]. {DOCUMENTS[0]}\n<|object_ref_end|>"
    closing = f"<|im_start|>The user's question is: {question}\n<|object_ref_end|>"
    expected = [start]
    for written, injected in ((script[1][0], first), (script[1][1], second), (script[1][2], closing)):
        expected.append(expected[-1] + written + injected)
    assert [text for text, _ in calls] == expected
    asked = start.removesuffix("<|im_end|>\n<|im_start|>")
    assert [routes for _, routes in calls] == [asked, asked + first, asked + second, asked + second]
    assert result.answers == ["Tombaugh, 1930"]
    assert [[d.id for d in r.documents] for r in result.rounds[0]] == [[1, 8], [0]]
    assert set(result.rounds[0][0].selected) == {2, 3}
    written = tokenizer("".join(script[1]), add_special_tokens=False)["input_ids"]
    assert result.tokens[0].tolist() == written


def test_rows_finish_independently(model, bank, tokenizer, monkeypatch):
    scripts = (
        ("Which animal sat?", ["<End-of-Retrieve>", "The answer to the question is: a cat<|im_end|>"]),
        ("Where does the Nile flow?", ["[6]<|object_ref_end|>", "<End-of-Retrieve>", "north<|im_end|>"]),
        ("What is dense?", ["gold<|im_end|>"]),
    )
    calls = scripted(model, tokenizer, monkeypatch, *scripts)
    result = generative_interleave(model, [question for question, _ in scripts], bank, tokenizer)
    assert result.answers == ["a cat", "north", "gold"]
    assert len(calls) == 2 + 3 + 1
    assert [len(rounds) for rounds in result.rounds] == [0, 1, 0]


@pytest.mark.parametrize("written", ["[99][100]<|object_ref_end|>", "<|object_ref_end|>"])
def test_no_valid_number_injects_nothing_and_goes_on(model, bank, tokenizer, monkeypatch, written):
    script = ("Who?", [written, "[3]<|object_ref_end|>", "<End-of-Retrieve>", "nobody<|im_end|>"])
    calls = scripted(model, tokenizer, monkeypatch, script)
    result = generative_interleave(model, ["Who?"], bank, tokenizer)
    assert calls[1][0] == PROMPT.format(question="Who?") + written + "<|object_ref_end|>"
    assert [[d.id for d in step.documents] for step in result.rounds[0]] == [[], [3]]
    assert len(calls) == 4 and result.answers == ["nobody"]


@pytest.mark.parametrize("written", ["nothing at all", ""])
def test_a_round_that_ends_without_a_marker_leads_to_the_answer(model, bank, tokenizer, monkeypatch, written):
    calls = scripted(model, tokenizer, monkeypatch, ("Who?", [written, "nobody<|im_end|>"]))
    result = generative_interleave(model, ["Who?"], bank, tokenizer)
    closing = "<End-of-Retrieve><|im_start|>The user's question is: Who?\n<|object_ref_end|>"
    assert calls[1][0] == PROMPT.format(question="Who?") + written + closing
    assert len(calls) == 2 and result.answers[0].endswith("nobody") and result.rounds == [[]]


def test_rounds_are_bounded_and_the_last_one_answers(model, bank, tokenizer, monkeypatch):
    calls = scripted(model, tokenizer, monkeypatch, ("Who?", ["[1]<|object_ref_end|>"] * 2 + ["I<|im_end|>"]))
    result = generative_interleave(model, ["Who?"], bank, tokenizer, max_rounds=3)
    assert len(calls) == 3 and len(result.rounds[0]) == 2 and result.answers == ["I"]
    with pytest.raises(ValueError, match="max_rounds and tokens_per_round must be at least 1"):
        generative_interleave(model, ["Who?"], bank, tokenizer, max_rounds=0)


def test_the_real_model_runs_through_generate(model, bank, tokenizer):
    batch = tokenizer(["Which animal sat?", "Who found Pluto and when?"], return_tensors="pt", padding=True)
    options = {"max_rounds": 2, "max_new_tokens": 5, "return_dict_in_generate": True}
    output = model.generate(**batch, memory=bank, **options)
    assert output.retrieval == "generative"  # what "auto" means for the reference's checkpoints
    assert len(output.answers) == len(output.rounds) == len(output.sequences) == 2
    assert torch.equal(output.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    empty = model.encode_memory([], tokenizer)
    assert (
        len(model.generate(**batch, memory=empty, tokenizer=tokenizer, max_rounds=2, max_new_tokens=3)) == 2
    )
