"""What a user does with a checkpoint, told in tokens.

Run as a program where msa_hf is absent, and imported where it is installed, with the same result.

    python remote_code_story.py CHECKPOINT WORK_FOLDER RETRIEVALS
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

DOCUMENTS = [
    "Ada wrote the first program in 1843.",
    "Water boils at 100 C.",
    "",
    "Paris is the capital of France and lies on the Seine, which flows into the sea at Le Havre.",
    "x",
    "Honey never spoils.",
    "Gold is dense.",
]
QUESTIONS = ["Which city lies on the Seine?", "What spoils?"]
# Small enough that most tokens of these questions and answers are packed.
QUANTIZED = {
    "cache_implementation": "quantized",
    "cache_config": {"backend": "turboquant", "preset": "3bit", "window": 4, "block": 4, "mean_group": 8},
}


def load(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, padding_side="left")
    return model, tokenizer


def tokens(model, tokenizer, questions=QUESTIONS, length=8, **options):
    """Greedy tokens of the questions in one batch."""
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    return model.generate(**batch, max_new_tokens=length, do_sample=False, **options).tolist()


def answer(model, tokenizer, memory, retrieval, **options):
    """Tokens, texts and the documents used, with their scores."""
    batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    output = model.generate(
        **batch,
        memory=memory,
        retrieval=retrieval,
        tokenizer=tokenizer,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    used = [[[d.id for d in own.documents] for own in rounds] for rounds in output.rounds]
    return {"tokens": output.sequences.tolist(), "texts": output.answers, "documents": used}


def tell(folder, work, retrievals, trust):
    """Everything that must be the same, in JSON."""
    model, tokenizer = load(folder, trust)
    told = {"plain": tokens(model, tokenizer), "fingerprint": model.fingerprint()}
    memory = model.encode_memory(DOCUMENTS, tokenizer)
    memory.save_pretrained(work / "memory")
    packed = memory.pack(key_bits=4, value_bits=4, router_bits=4)
    packed.save_pretrained(work / "packed memory")
    for retrieval in retrievals:
        told[retrieval] = answer(model, tokenizer, memory, retrieval)
    told["packed memory"] = answer(model, tokenizer, packed, "attention")
    told["ranking"] = [[document.id for document in row] for row in model.rank_documents(QUESTIONS, memory)]
    for attention in ("sdpa", "turboquant"):
        model.set_attn_implementation(attention)
        told[f"quantised, {attention}"] = tokens(model, tokenizer, length=12, **QUANTIZED)
        told[f"quantised, memory, {attention}"] = answer(model, tokenizer, memory, "attention", **QUANTIZED)
    model.set_attn_implementation("sdpa")
    for name in ("memory", "packed memory"):
        loaded = type(memory).from_pretrained(work / name, model, tokenizer)
        told[f"{name}, loaded"] = answer(model, tokenizer, loaded, "attention")
    model.save_pretrained(work / "again")
    tokenizer.save_pretrained(work / "again")
    model, tokenizer = load(work / "again", trust)
    told["again"] = tokens(model, tokenizer)
    told["again, quantised"] = tokens(model, tokenizer, length=12, **QUANTIZED)
    loaded = type(memory).from_pretrained(work / "memory", model, tokenizer)
    for retrieval in retrievals:
        told[f"again, {retrieval}"] = answer(model, tokenizer, loaded, retrieval)
    base = AutoModel.from_pretrained(work / "again", trust_remote_code=trust)
    told["hidden states"] = base(torch.tensor(told["plain"])).last_hidden_state.sum(-1).tolist()
    return told


if __name__ == "__main__":
    checkpoint, folder, modes = sys.argv[1:]
    result = tell(checkpoint, Path(folder), modes.split(","), trust=True)
    assert "msa_hf" not in sys.modules
    print(json.dumps(result))
