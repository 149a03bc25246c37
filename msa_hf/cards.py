"""Cards of models, routers, memories and kernels, written from what is known of them and never by hand.

What nobody measured is "not measured", and a license that nobody noted is "unknown". Every block of Python in
a card runs as it is, once the repository is on the Hub.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from . import card_sections as sections
from .card_facts import (
    UNKNOWN_LICENSE,
    Base,
    adapter_facts,
    kernel_facts,
    memory_facts,
    model_facts,
)
from .kernel_export import NAME as KERNELS
from .kernel_export import VERSION as KERNELS_VERSION
from .kernel_export import export_kernels

if TYPE_CHECKING:
    from .store import MemoryStore

REPOSITORY, REVISION = "USER/NAME", "main"
_MSA, _TURBOQUANT = "arxiv:2603.23516", "arxiv:2504.19874"
_PAPER = "[arXiv 2603.23516](https://arxiv.org/abs/2603.23516)"
_TURBOQUANT_PAPER = "[arXiv 2504.19874](https://arxiv.org/abs/2504.19874)"
_NAME = """\
## The name

MSA here is Memory Sparse Attention. Inside Transformers, "MSA" means MiniMax Sparse Attention, which is
another thing."""
_WRITTEN = "This card was written by `msa-hf push` from the files beside it."


def model_card(
    folder: str | Path,
    repository: str = REPOSITORY,
    *,
    revision: str = REVISION,
    base_model: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a folder that `convert` or `save_pretrained` wrote.

    Args:
        repository, revision: where it is going to be.
        base_model, license: of the backbone on the Hub, where neither the folder nor a measurement says it.

    Raises CardError if there is no model of ours, MemoryFormatError if its weights are damaged.
    """
    facts = model_facts(folder, base_model, license)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "msa_hf",
            "memory-sparse-attention",
            "long-context",
            "retrieval",
            "custom_code",
            _MSA,
            _TURBOQUANT,
        ],
        **_of_base(facts.base, "finetune"),
    )
    name = repository.split("/")[-1]
    parts = [
        f"# {name}",
        f"A {facts.config.backbone_type} language model with a memory: documents are encoded once, pooled "
        "into a small bank of vectors, found by routers, and read by the model when it answers. Memory "
        f"Sparse Attention ({_PAPER}), made with msa_hf.",
        sections.model_table(facts),
        sections.model_usage(repository, revision),
        sections.pinning(revision, "This repository holds Python code, which `trust_remote_code=True` runs."),
        sections.measured(facts.base.measured),
        sections.limits(sections.model_limits(facts)),
        _NAME,
        sections.license(facts.base),
        _WRITTEN,
    ]
    return _card(ModelCard, data, parts)


def adapter_card(
    folder: str | Path,
    repository: str = REPOSITORY,
    *,
    revision: str = REVISION,
    base_model: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a folder that train-router wrote; arguments and errors as of `model_card`.

    `base_model` is the backbone that the routers were trained on.
    """
    facts = adapter_facts(folder, base_model, license)
    data = ModelCardData(
        library_name="peft",
        tags=["msa_hf", "memory-sparse-attention", "routers", "retrieval", _MSA],
        **_of_base(facts.base, "adapter"),
    )
    parts = [
        f"# {repository.split('/')[-1]}",
        f"Routers for {facts.base.name or 'a language model'}: the linear maps by which it finds documents "
        f"in a memory. Memory Sparse Attention ({_PAPER}), trained with msa_hf.",
        sections.adapter_table(facts),
        sections.adapter_usage(facts, repository, revision),
        sections.pinning(revision, "An adapter is weights and settings; nothing in it is run."),
        sections.training(facts),
        sections.measured(facts.base.measured),
        sections.limits(
            [
                "Routers belong to one backbone: on another, or on this one once it is trained further, "
                "they route at chance.",
                "PEFT loads weights alone, so the model must have been converted with the settings above.",
            ]
        ),
        _NAME,
        sections.license(facts.base),
        _WRITTEN,
    ]
    return _card(ModelCard, data, parts)


def memory_card(
    source: MemoryStore | str | Path,
    repository: str = REPOSITORY,
    *,
    revision: str = REVISION,
    model: str | None = None,
    license: str | None = None,
) -> DatasetCard:
    """The card of a store, or of the folder of an export.

    Args:
        model: on the Hub, the one that made the memory and reads it. license: of the documents.

    Raises CardError where there is neither, MemoryFormatError for a damaged export.
    """
    facts = memory_facts(source, model)
    data = DatasetCardData(
        license=license or UNKNOWN_LICENSE,
        pretty_name=repository.split("/")[-1],
        size_categories=_size_category(facts.documents),
        tags=["msa_hf", "memory-sparse-attention", "memory", _MSA],
        configs=[{"config_name": "default", "data_files": "documents.jsonl"}],
    )
    parts = [
        f"# {repository.split('/')[-1]}",
        "A memory for a language model: documents, and the vectors by which the model that made them finds "
        f"and reads them. Memory Sparse Attention ({_PAPER}), made with msa_hf.",
        sections.memory_table(facts),
        sections.memory_usage(facts, repository, revision),
        sections.pinning(
            revision,
            "Loading a memory runs nothing from it: it is JSON lines and safetensors, and every file is "
            "checked against the SHA-256 that `export.json` names.",
        ),
        sections.measured(None),
        sections.limits(
            [
                "A memory belongs to the model that made it: the same weights, routers, tokenizer and chunk "
                "sizes. Another model must encode the documents again (`reencode`).",
                "Whoever can read the repository can read the documents: their text is in `documents.jsonl`.",
                "What is forgotten in a store later stays in the commits of this repository.",
            ]
        ),
        _NAME,
        "## License\n\n"
        + (
            f"The documents: {license}."
            if license
            else "The license of the documents is unknown: nobody noted it. Ask before using them."
        ),
        _WRITTEN,
    ]
    return _card(DatasetCard, data, parts)


def kernel_card(
    variant: str | Path | None = None, repository: str = REPOSITORY, *, revision: str = f"v{KERNELS_VERSION}"
) -> ModelCard:
    """The card of kernels, from the folder that `export_kernels` returned; None: those of this package."""
    if variant is None:
        with TemporaryDirectory() as folder:
            facts = kernel_facts(export_kernels(folder))
    else:
        facts = kernel_facts(variant)
    data = ModelCardData(
        library_name="kernels",
        license=facts.metadata["license"].lower(),
        tags=["kernels", "triton", "kv-cache", "quantization", _MSA, _TURBOQUANT],
    )
    rows = [[f"`{name}`", what.rstrip(".")] for name, what in facts.operators.items()]
    parts = [
        f"# {repository.split('/')[-1]}",
        f"{KERNELS}, version {facts.metadata['version']}: Triton kernels for keys and values that stay packed"
        f" in 1 to 6 bits (TurboQuant, {_TURBOQUANT_PAPER}) and for memories of millions of chunks"
        f" (Memory Sparse Attention, {_PAPER}). They belong to msa_hf, which has a PyTorch twin of each.",
        sections.table(["operator", "what it computes"], rows),
        sections.kernel_usage(repository, revision),
        sections.pinning(revision, "Kernels are code that `get_kernel` runs."),
        sections.measured(facts.measured, "On a GPU: not measured."),
        sections.limits(
            [
                "Triton is needed; without it no operator is available.",
                "No backward pass: msa_hf trains on its plain products.",
                "head_dim a multiple of 8 from 16 to 256.",
            ]
        ),
        _NAME,
        f"## License\n\n{facts.metadata['license']}.",
        _WRITTEN,
    ]
    return _card(ModelCard, data, parts)


def _card(kind: type, data: CardData, parts: list[str]) -> Any:
    text = "\n\n".join(part for part in parts if part)
    card = kind(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    # What is written must be what a reader of the card gets.
    if kind(str(card)).data.to_dict() != data.to_dict():
        raise ValueError("the card's metadata does not survive being written")
    return card


def _of_base(base: Base, relation: str) -> dict[str, Any]:
    measured = base.measured or {}
    found = {
        "license": base.license,
        "language": measured.get("language"),
        "datasets": measured.get("datasets"),
    }
    return found | ({"base_model": base.name, "base_model_relation": relation} if base.name else {})


def _size_category(documents: int) -> str:
    """The Hub's own steps of dataset sizes."""
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if documents < limit:
            return name
    return "1M<n<10M"
