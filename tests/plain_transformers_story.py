"""What stock Transformers makes of converted checkpoints: run as a program by test_plain_transformers.py.

    python plain_transformers_story.py FOLDER

FOLDER holds pairs of folders: NAME/original and NAME/converted.
"""

import json
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPTS = ["Which court heard the case?", "Why?", "The treaty of 1648 ended which war, and where"]
MESSAGES = [{"role": "user", "content": "Which court heard the case?"}]
DOCUMENTS = ["Ada wrote the first program in 1843.", "Water boils at 100 C.", "", "Honey never spoils."]
CACHE = {"backend": "turboquant", "window": 4, "block": 4, "mean_group": 8}
AUTO = {"trust_remote_code": True, "device_map": "auto", "dtype": "auto"}
OFF = {"max_new_tokens": 8, "do_sample": False}


def tensors(model):
    return dict(chain(model.named_parameters(), model.named_buffers()))


def written(folder):
    """Texts of the pipeline: one, several in a batch, and an answer by the chat template."""
    run = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    run.tokenizer.padding_side = "left"
    return [run(PROMPTS[0], **OFF), run(PROMPTS, batch_size=3, **OFF), run(MESSAGES, **OFF)]


def pair(folder):
    """What is found for one pair; see the test."""
    original = AutoModelForCausalLM.from_pretrained(folder / "original", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "original", padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ids = batch["input_ids"][:1]
    model = AutoModelForCausalLM.from_pretrained(folder / "converted", low_cpu_mem_usage=True, **AUTO)
    base = AutoModel.from_pretrained(folder / "converted", **AUTO)
    mine, theirs = tensors(model), tensors(original)
    found = {
        "pipeline": [written(folder / name) for name in ("original", "converted")],
        "tokens": [own.generate(**batch, **OFF).tolist() for own in (original, model)],
        "types": sorted({str(own.dtype) for own in model.parameters()} | {str(model.dtype), str(base.dtype)}),
        "unfilled": [name for name, tensor in chain(mine.items(), tensors(base).items()) if tensor.is_meta],
        "other": [name for name in theirs if not torch.equal(mine[name], theirs[name])],
        "states": (base(ids).last_hidden_state - original.model(ids).last_hidden_state).abs().max().item(),
    }
    half = sum(tensor.nbytes for tensor in model.parameters()) // 2
    memory = model.encode_memory(DOCUMENTS, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        places = {"memory": {"max_memory": {"cpu": half}}, "all": {"device_map": {"": "disk"}}}
        for name, place in places.items():
            own = AutoModelForCausalLM.from_pretrained(
                folder / "converted", **{**AUTO, "offload_folder": f"{scratch}/{name}", **place}
            )
            found[f"offloaded, {name}"] = offloaded(own, model, batch, tokenizer, memory)
            own.save_pretrained(f"{scratch}/again")
            again = AutoModelForCausalLM.from_pretrained(f"{scratch}/again", trust_remote_code=True)
            state = model.state_dict()
            found["other"] += [
                key for key, own in again.state_dict().items() if not torch.equal(own, state[key])
            ]
    return found


def offloaded(model, whole, batch, tokenizer, memory):
    """Where layers lie on disk: tokens here and in the whole model, without a memory and with one."""
    found = {"places": sorted({str(place) for place in model.hf_device_map.values()}), "tokens": []}
    found["fingerprints"] = [model.fingerprint(), whole.fingerprint()]
    own = model.encode_memory(DOCUMENTS, tokenizer)
    quantized = {"cache_implementation": "quantized", "cache_config": CACHE}
    reading = {"retrieval": "attention", "memory": memory}
    for options in ({}, quantized, reading, reading | {"memory": own}, reading | quantized):
        answers = [one.generate(**batch, **OFF, **options).tolist() for one in (model, whole)]
        found["tokens"].append(answers)
    routed = {"retrieval": "router", "memory": own, "tokenizer": tokenizer}
    found["tokens"].append([one.generate(**batch, **OFF, **routed).tolist() for one in (model, whole)])
    return found


if __name__ == "__main__":
    result = {path.name: pair(path) for path in sorted(Path(sys.argv[1]).iterdir())}
    assert "msa_hf" not in sys.modules
    print(json.dumps(result))
