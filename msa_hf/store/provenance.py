"""What a model and its tokenizer say about the vectors that they make."""

import hashlib
import json
from dataclasses import asdict

from ..modeling.configuration_msa import MemorySettings
from ..modeling.memory_encoding import encode_head, typical_means
from ..modeling.sample_texts import SAMPLE_TEXTS
from .coding import Coding, Provenance


def provenance_of(
    model, tokenizer, key_bits: int | None, value_bits: int | None, router_bits: int | None
) -> Provenance:
    """Provenance of a store that `model` and `tokenizer` fill. Raises ValueError for other bits."""
    if not model.config.router_layers:
        raise ValueError("router_layers must name at least one layer to keep a memory; got []")
    for name, bits in (("key_bits", key_bits), ("value_bits", value_bits), ("router_bits", router_bits)):
        if bits is not None and (type(bits) is not int or not 1 <= bits <= 4):
            raise ValueError(f"{name} must be 1, 2, 3, 4 or None; got {bits!r}")
    # Of our own class, so that it is equal to what is stored: remote code has a class of its own.
    settings = MemorySettings(**asdict(model.config.memory_settings))
    return Provenance(
        settings=settings,
        fingerprint=model.fingerprint(),
        tokenizer=tokenizer_digest(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        key_bits=key_bits,
        value_bits=value_bits,
        router_bits=router_bits,
    )


def coding_of(provenance: Provenance, model, tokenizer) -> Coding:
    """The coders that follow from a model."""
    head = {layer: tuple(own.cpu() for own in pair) for layer, pair in encode_head(model, tokenizer).items()}
    return Coding(provenance, typical_means(model, tokenizer), head)


def tokenizer_digest(tokenizer) -> str:
    """Short hash of the vocabulary, and of how texts of many kinds are cut into it."""
    known = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    known.update(json.dumps(tokenizer(list(SAMPLE_TEXTS), add_special_tokens=False)["input_ids"]).encode())
    return known.hexdigest()[:16]
