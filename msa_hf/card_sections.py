"""The sections of cards: tables of facts, code to paste, how to pin it, what was measured, limits."""

from __future__ import annotations

from typing import Any

from .card_facts import UNKNOWN_LICENSE, AdapterFacts, Base, MemoryFacts, ModelFacts


def model_table(facts: ModelFacts) -> str:
    config = facts.config
    layers = ", ".join(map(str, config.router_layers)) or "none"
    rows = [
        ["backbone", facts.base.name or f"{config.backbone_type}; which one was not noted"],
        ["parameters", f"{facts.parameters:,} in {facts.dtype}"],
        ["layers", f"{config.num_hidden_layers}, of which {layers} route (counted from 0)"],
        ["routers", "trained" if config.routers_trained else "**not trained**: they select at chance"],
        [
            "chunks",
            f"{config.chunk_size} tokens of keys and values, {config.router_chunk_size} of router keys",
        ],
        ["reading", f'`retrieval="{config.retrieval}"`, {config.top_k_documents} documents per layer'],
        ["positions", f"{config.max_position_embeddings:,} tokens"],
    ]
    rows[1:1] = _base_weights(facts.base)
    return table(["", ""], rows)


def adapter_table(facts: AdapterFacts) -> str:
    rows = [
        ["backbone", facts.base.name or "not noted"],
        [
            "contents",
            "full router weights" + (f", LoRA of rank {facts.lora_rank}" if facts.lora_rank else ""),
        ],
    ]
    rows += _base_weights(facts.base)
    rows += [[f"`{name}`", f"`{value}`"] for name, value in facts.settings.items()]
    return table(["", ""], rows)


def _base_weights(base: Base) -> list[list[str]]:
    """Which weights of the backbone the measurements and the routers are about."""
    measured = base.measured or {}
    return [["its weights", measured["base_weights"]]] if "base_weights" in measured else []


def memory_table(facts: MemoryFacts) -> str:
    made = facts.provenance
    bits = ", ".join(f"{name} {'dense' if own is None else own}" for name, own in made.bits.items())
    rows = [
        ["documents", f"{facts.documents:,}"],
        ["namespaces", ", ".join(f"{name} ({count:,})" for name, count in facts.namespaces.items())],
        ["text", f"{facts.text_bytes:,} bytes"],
        ["vectors", f"{facts.vector_bytes:,} bytes; bits per number: {bits}"],
        ["made by", facts.model or "a model that was not noted"],
        ["fingerprint of the model", ", ".join(f"{name} `{own}`" for name, own in made.fingerprint.items())],
        ["chunks", f"{made.settings.chunk_size} tokens, router keys {made.settings.router_chunk_size}"],
        ["router layers", ", ".join(map(str, made.settings.router_layers))],
    ]
    return table(["", ""], rows)


def model_usage(repository: str, revision: str) -> str:
    block = python(f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        repository, pinned = "{repository}", {{"revision": "{revision}", "trust_remote_code": True}}
        model = AutoModelForCausalLM.from_pretrained(repository, dtype="auto", **pinned)
        tokenizer = AutoTokenizer.from_pretrained(repository, **pinned)

        documents = [
            "Seine\\nThe Seine is a river in France. It flows through Paris.",
            "Nile\\nThe Nile is a river in Africa. It flows through Cairo.",
        ]
        memory = model.encode_memory(documents, tokenizer)
        question = tokenizer("Which river flows through Cairo?", return_tensors="pt")
        output = model.generate(
            **question, memory=memory, max_new_tokens=16, return_dict_in_generate=True
        )
        print(output.answers[0])
        for step in output.rounds[0]:
            print([(document.id, document.score) for document in step.documents])
        """)
    return (
        f"## Use it\n\nPyTorch and Transformers are enough; the code comes from this repository:\n\n{block}"
    )


def adapter_usage(facts: AdapterFacts, repository: str, revision: str) -> str:
    if facts.base.name is None:
        return (
            "## Use it\n\nWhich backbone these routers were trained on was not noted. Convert it with them: "
            "`msa-hf convert BACKBONE ./model --routers FOLDER`, where FOLDER is a copy of this repository."
        )
    merged = python(f"""
        from huggingface_hub import snapshot_download
        from msa_hf.conversion import convert

        routers = snapshot_download("{repository}", revision="{revision}")
        convert("{facts.base.name}", "./model-with-memory", routers=routers)
        """)
    settings = {name: value for name, value in facts.settings.items() if value is not None}
    by_peft = python(f"""
        import msa_hf
        from msa_hf.conversion import convert
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        settings = {settings}
        folder = convert("{facts.base.name}", "./model-without-routers", **settings)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = PeftModel.from_pretrained(model, "{repository}", revision="{revision}")
        """)
    return (
        "## Use it\n\nWith msa_hf installed, a model with these routers in it, settings and all:\n\n"
        f"{merged}\n\nOr through PEFT, onto a model that was converted with these settings:\n\n{by_peft}"
    )


def memory_usage(facts: MemoryFacts, repository: str, revision: str) -> str:
    names = list(facts.namespaces)
    reads = "" if names in ([], ["default"]) else f", namespaces={names!r}"
    alone = python(f"""
        from msa_hf import MemoryStore

        store = MemoryStore.from_hub("{repository}", "./memory", revision="{revision}")
        print(len(store), store.namespaces(), store.verify())  # [] means that every byte is right
        print([(hit.id, hit.text[:80]) for hit in store.search("a few words", k=3{reads})])
        store.close()
        """)
    text = f"## Use it\n\nWith msa_hf installed; words are found without any model:\n\n{alone}\n\n"
    if facts.model is None:
        return text + (
            "Asking it questions takes the model with the fingerprint above, which was not noted: "
            '`MemoryStore.open("./memory", model, tokenizer)`, then `model.generate(..., memory=store)`.'
        )
    bank = "" if names in ([], ["default"]) else f".bank({names!r})"
    asked = python(f"""
        import msa_hf
        from msa_hf import MemoryStore
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained("{facts.model}", dtype="{facts.provenance.dtype}")
        tokenizer = AutoTokenizer.from_pretrained("{facts.model}")
        with MemoryStore.open("./memory", model, tokenizer, read_only=True) as store:
            question = tokenizer("What do you know?", return_tensors="pt")
            output = model.generate(
                **question, memory=store{bank}, max_new_tokens=16, return_dict_in_generate=True
            )
            print(output.answers[0])
        """)
    return text + f"Asked questions, by the model that made it:\n\n{asked}"


def kernel_usage(repository: str, revision: str) -> str:
    block = python(f"""
        import torch
        from kernels import get_kernel

        msa = get_kernel("{repository}", revision="{revision}", trust_remote_code=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU needs TRITON_INTERPRET=1
        scores = torch.randn(1, 1_000, device=device)
        values, documents = msa.top_documents(scores, 16)
        print(documents)
        """)
    return (
        f"## Use it\n\n{block}\n\nWith msa_hf installed, `msa_hf.kernels` is the same, and runs by itself on "
        "CUDA devices."
    )


def pinning(revision: str, why: str) -> str:
    return (
        f'## Pin it\n\n{why} `revision="{revision}"` may move: replace it by the commit that you looked at, '
        'the 40 digits under "Files and versions", "History", and keep it.'
    )


def training(facts: AdapterFacts) -> str:
    if facts.training is None:
        return "## Training\n\nNo log is beside the weights."
    lines = ["## Training"]
    measured = facts.base.measured or {}
    if "data" in measured:
        lines.append(f"Data: {measured['data']}.")
    if count := facts.questions:
        lines.append(f"{count['questions']:,} questions, {count.get('documents', 0):,} documents.")
    if settings := facts.training.get("config"):
        lines.append("Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".")
    result = facts.training.get("result") or {}
    rows = [[f"layer {layer}", *own.values()] for layer, own in (result.get("layers") or {}).items()]
    columns = next((list(own) for own in (result.get("layers") or {}).values()), [])
    if result.get("consensus") and list(result["consensus"]) == columns:
        rows.append(["consensus", *result["consensus"].values()])
    if rows:
        lines += ["On questions that were held out:", table(["", *columns], rows)]
    return "\n\n".join(lines)


def measured(known: dict[str, Any] | None, otherwise: str = "Not measured.") -> str:
    if known is None:
        return f"## Measured\n\n{otherwise}"
    memory = f" Memory: {known['memory']}." if "memory" in known else ""
    lines = [f"## Measured\n\n{known['date']}, {known['machine']}.{memory}"]
    for own in known["tables"]:
        lines += [f"{own['title']}:", table(own["columns"], own["rows"])]
    return "\n\n".join(lines + known.get("notes", []))


def model_limits(facts: ModelFacts) -> list[str]:
    limits = [
        "A memory belongs to the model that made it: the same weights, routers and chunk sizes. Anything "
        "else is an error that says what differs.",
        f"Documents longer than {facts.config.max_position_embeddings:,} tokens must be split first.",
        "It answers as well as its backbone: it can find the right document and still answer wrongly.",
    ]
    if not facts.config.routers_trained:
        limits.insert(
            0,
            "The routers are not trained, so routing alone picks documents by chance: train them with "
            "`msa-hf train-router`.",
        )
    return limits


def limits(lines: list[str]) -> str:
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def license(base: Base) -> str:
    of = f"the base model, {base.name}," if base.name else "the base model"
    if base.license == UNKNOWN_LICENSE:
        return f"## License\n\nThe license of {of} was not noted, so that of this repository is unknown."
    return f"## License\n\n{base.license}, the license of {of.rstrip(',')}."


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(own) for own in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def python(block: str) -> str:
    lines = block.strip("\n").rstrip().split("\n")
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(["```python", *(line[margin:] for line in lines), "```"])
