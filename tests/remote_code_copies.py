"""Two copies of remote code and the package in one process: run as a program by test_remote_code.py.

    python remote_code_copies.py FIRST_CHECKPOINT SECOND_CHECKPOINT "package first" | "package last"

The package and the first copy read the first checkpoint; the second has the same weights and other code.
"""

import copy
import json
import pickle
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

DOCUMENTS = ["Ada wrote the first program in 1843.", "", "Paris lies on the Seine.", "Honey never spoils."]
QUESTIONS = ["Which city lies on the Seine?", "What spoils?"]
CACHE = {"preset": "3bit", "window": 4, "block": 4, "mean_group": 8}


def load(first, second, order):
    """The models by the name of their code."""
    if order == "package last":
        remote = [
            AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True) for own in (first, second)
        ]
    from msa_hf import MSAForCausalLM

    package = MSAForCausalLM.from_pretrained(first)
    if order == "package first":  # then the Auto classes prefer the package
        classes = [
            get_class_from_dynamic_module("modeling_msa.MSAForCausalLM", own) for own in (first, second)
        ]
        remote = [cls.from_pretrained(own) for cls, own in zip(classes, (first, second))]
    return {"package": package, "first": remote[0], "second": remote[1]}


def sibling(model, module, name):
    """A name of the code that `model` has its class from."""
    return getattr(import_module(f"{type(model).__module__.rpartition('.')[0]}.{module}"), name)


def cache_of(model, **options):
    return sibling(model, "cache_turboquant", "TurboQuantCache")(model.config, **CACHE, **options)


def main(first, second, order):
    models = load(first, second, order)
    assert (
        len({type(model) for model in models.values()}) == len({type(m.config) for m in models.values()}) == 3
    )
    tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=False, padding_side="left")
    batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    told = {}

    def tell(case, name, model, **options):
        tokens = model.generate(**batch, max_new_tokens=10, do_sample=False, **options).tolist()
        told.setdefault(case, {})[name] = tokens

    for maker, owner in models.items():
        bank = owner.encode_memory(DOCUMENTS, tokenizer)
        packed = bank.pack(4, 4, 4)
        with tempfile.TemporaryDirectory() as folder:
            bank.save_pretrained(folder)
            loaded = type(bank).from_pretrained(folder, models["package"], tokenizer)
        for reader, model in models.items():
            name = f"{maker}, {reader}"
            for kind, memory in (("dense", bank), ("packed", packed), ("dense", loaded)):
                tell(f"{kind} memory", name, model, memory=memory, retrieval="attention")
            tell("router", name, model, memory=bank, retrieval="router", tokenizer=tokenizer)
            for attention in ("sdpa", "turboquant"):
                model.set_attn_implementation(attention)
                cache = cache_of(owner, left_padding=batch["attention_mask"])
                tell(f"cache, {attention}", name, model, past_key_values=cache)
                assert "packed" in str(copy.deepcopy(cache).report())
                reading = {"memory": bank, "retrieval": "attention"}
                tell(f"cache, memory, {attention}", name, model, past_key_values=cache_of(owner), **reading)
            model.set_attn_implementation("sdpa")
    for name, model in models.items():
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is type(model) and type(again.config) is type(model.config)
            tell("copied", name, again)
        tell("copied", f"{name} itself", model)
    check_dispatch(models, batch)
    check_store(models, tokenizer, tell)
    print(json.dumps(told))


def check_dispatch(models, batch):
    """A cache is read by the copy that made it, whichever copy registered its attention last."""
    for owner in models.values():
        ops = sibling(owner, "ops", "__dict__")
        for model in models.values():
            calls = []

            def counted(*arguments, plain=ops["plain_code_scores"], calls=calls):
                calls.append(arguments)
                return plain(*arguments)

            model.set_attn_implementation("turboquant")
            with ops["override"](code_scores=counted):
                model.generate(**batch, max_new_tokens=10, past_key_values=cache_of(owner))
            model.set_attn_implementation("sdpa")
            assert calls, f"{type(model)} does not read the cache of {type(owner)} by its own products"


def check_store(models, tokenizer, tell):
    """A store of the package, filled through each model and read by all."""
    from msa_hf import MemoryStore

    for maker, owner in models.items():
        with tempfile.TemporaryDirectory() as folder:
            for bits in (4, None):
                path = Path(folder, str(bits))
                options = {"key_bits": bits, "value_bits": bits, "router_bits": bits}
                with MemoryStore.create(path, owner, tokenizer, **options) as store:
                    store.add(DOCUMENTS)
                for reader, model in models.items():
                    with MemoryStore.open(path, model, tokenizer, read_only=True) as store:
                        memory = {"memory": store, "retrieval": "attention"}
                        tell(f"store, {bits}", f"{maker}, {reader}", model, **memory)


if __name__ == "__main__":
    main(*sys.argv[1:])
