"""Documents -> MemoryBank: batches of similar length, every document alone from position 0, chunk-pooled
(paper section 3.2).

Axis letters: B documents of a batch, T tokens, G key/value heads, D head dim, E hidden size, C chunks.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .memory_bank import DenseVectors, LayerMemory, MemoryBank, chunk_counts, first_rows, segment_rows
from .memory_files import NAMES
from .ops import pool_chunks
from .prompts_msa import document_prompt, template_head
from .sample_texts import SAMPLE_TEXTS

logger = logging.get_logger(__name__)
# On a CPU one document at a time is as fast as any batch from some hundred tokens on, and then its vectors
# are the same to the last bit in every memory.
CPU_BATCH_TOKENS, BATCH_TOKENS = 1, 16384
PORTION_TOKENS = 4096


class DenseRecorder:
    """Recorder for `MSAModel.encode`: pools one batch of rows; `vectors[layer]` holds keys, values and
    router keys.

    Args:
        lengths: [B] int64 on the CPU, real tokens of each row.
    """

    def __init__(self, model, lengths: torch.Tensor):
        self.model, self.lengths, self.config = model, lengths, model.config
        self.vectors: dict[int, tuple[DenseVectors, DenseVectors, DenseVectors]] = {}

    def __call__(self, layer: int, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, values = (states.transpose(1, 2).flatten(2) for states in (keys, values))
        routed = hidden if self.config.separate_router else keys
        pooled = (
            pool_chunks(keys, self.lengths, self.config.chunk_size),
            pool_chunks(values, self.lengths, self.config.chunk_size),
            self.model.layers[layer].self_attn.router_keys(
                pool_chunks(routed, self.lengths, self.config.router_chunk_size)
            ),
        )
        self.vectors[layer] = tuple(DenseVectors(vectors) for vectors in pooled)


@torch.no_grad()
def encode_documents(
    model,
    documents: list[str],
    tokenizer,
    batch_tokens: int | None = None,
    progress: bool = False,
    resume_dir: str | Path | None = None,
    metadata: dict | None = None,
    numbers: list[int] | None = None,
    means: dict[tuple[int, str], torch.Tensor] | None = None,
) -> MemoryBank:
    """See `MSAForCausalLM.encode_memory`."""
    config, settings = model.config, model.config.memory_settings
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(model.device)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
    if not config.router_layers:
        raise ValueError("router_layers must name at least one layer to encode a memory; got []")
    documents = list(documents)
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise ValueError(f"documents must be texts; documents[{index}] is {type(text).__name__}")
    if numbers is not None and len(numbers) != len(documents):
        raise ValueError(f"numbers must have one entry per document ({len(documents)}); got {len(numbers)}")
    tokens = tokenize_documents(documents, tokenizer, config.prompt_format, progress, numbers)
    longest = max(map(len, tokens), default=0)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"documents must have at most max_position_embeddings={config.max_position_embeddings} "
            "tokens; the longest has "
            f"{longest}. Split it first (msa_hf.documents.split_document)."
        )
    counts = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    offsets = {
        "keys": first_rows(chunk_counts(counts, settings.chunk_size)),
        "router_keys": first_rows(chunk_counts(counts, settings.router_chunk_size)),
    }
    offsets["values"] = offsets["keys"]
    width, device, dtype = settings.num_key_value_heads * settings.head_dim, model.device, model.dtype
    layers = {
        layer: LayerMemory(
            *(DenseVectors.allocate(int(offsets[name][-1]), width, dtype, device) for name in NAMES)
        )
        for layer in settings.router_layers
    }
    resume = None
    if resume_dir is not None:
        resume = _Portions(resume_dir, model, documents, batch_tokens, dtype)
    bar = logging.tqdm(
        total=int(counts.sum()), unit="tok", unit_scale=True, desc="encoding", disable=not progress
    )
    with bar:
        for number, portion in enumerate(_portions(counts.tolist(), batch_tokens)):
            pooled = resume.load(number) if resume else None
            if pooled is None:
                encoded = [_encode_batch(model, [tokens[index] for index in batch]) for batch in portion]
                pooled = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
                if resume:
                    resume.save(number, pooled)
            chosen = torch.tensor([index for batch in portion for index in batch])
            for name in NAMES:
                rows = segment_rows(offsets[name], chosen).to(device)
                for layer in settings.router_layers:
                    getattr(layers[layer], name).write(rows, pooled[f"{layer}.{name}"])
            bar.update(int(counts[chosen].sum()))
    return MemoryBank(
        documents=documents,
        token_counts=counts,
        settings=settings,
        layers=layers,
        head=encode_head(model, tokenizer),
        fingerprint=model.fingerprint(),
        metadata=metadata or {},
        tokenizer=tokenizer,
        means=typical_means(model, tokenizer) if means is None else means,
        numbers=numbers,
    )


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens that are encoded at once."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


@torch.no_grad()
def typical_means(model, tokenizer) -> dict[tuple[int, str], torch.Tensor]:
    """Mean pooled keys and values [G, D] float32 of texts of many kinds, by (layer, "keys" or "values").

    They follow from the model alone, so that what is coded without them has the same bytes in every memory.
    A memory's own means would leave an error of keys 10 to 30 % smaller (BENCHMARKS.md, "Packed memories").
    """
    key = (model.weights_key(), id(tokenizer))
    if getattr(model, "_typical_means", (None,))[0] != key:
        rows = [
            torch.tensor(ids) for ids in tokenizer(list(SAMPLE_TEXTS), add_special_tokens=False)["input_ids"]
        ]
        limit = model.config.max_position_embeddings
        states: dict[tuple[int, str], list[torch.Tensor]] = {}
        for row in rows:
            for name, vectors in _encode_batch(model, [row[:limit]]).items():
                layer, _, kind = name.partition(".")
                if kind != "router_keys":
                    states.setdefault((int(layer), kind), []).append(vectors)
        heads = model.config.num_key_value_heads
        means = {
            name: torch.cat(parts).double().mean(0).float().unflatten(0, (heads, -1)).cpu()
            for name, parts in states.items()
        }
        model._typical_means = (key, means)
    return dict(model._typical_means[1])


def tokenize_documents(
    documents: list[str],
    tokenizer,
    prompt_format: str,
    progress: bool = False,
    numbers: list[int] | None = None,
) -> list[torch.Tensor]:
    """Token ids (int32) of each document as it is encoded; tokenised in portions, so that memory stays
    small."""
    numbers = range(len(documents)) if numbers is None else numbers
    rows: list[torch.Tensor] = []
    portions = range(0, len(documents), 2048)
    for start in logging.tqdm(
        portions, unit="portion", desc="tokenizing", disable=not progress or len(portions) < 4
    ):
        texts = [
            document_prompt(prompt_format, numbers[start + i], text)
            for i, text in enumerate(documents[start : start + 2048])
        ]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows.extend(torch.tensor(row, dtype=torch.int32) for row in ids)
    return rows


def length_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of non-empty documents, longest first, in batches of at most `budget` padded tokens (at least
    one document)."""
    order = sorted(
        (index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index]
    )
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _portions(lengths: list[int], budget: int) -> Iterator[list[list[int]]]:
    """The batches of `length_batches`, some at a time: what is written, and kept for resuming, at once."""
    portion, tokens = [], 0
    for batch in length_batches(lengths, budget):
        portion.append(batch)
        tokens += sum(lengths[index] for index in batch)
        if tokens >= PORTION_TOKENS:
            yield portion
            portion, tokens = [], 0
    if portion:
        yield portion


def pad_rows(rows: list[torch.Tensor], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] on `device`, and lengths [B] on the CPU."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    return ids.to(device), lengths


def _encode_batch(model, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, lengths = pad_rows(rows, model.device)
    recorder = DenseRecorder(model.model, lengths)
    model.model.encode(ids, recorder)
    return {
        f"{layer}.{name}": vectors.data
        for layer, parts in recorder.vectors.items()
        for name, vectors in zip(NAMES, parts)
    }


@torch.no_grad()
def encode_head(model, tokenizer) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """K and V [G, tokens, D] of the template head in every layer; empty where the format has none."""
    text = template_head(model.config.prompt_format)
    if not text:
        return {}
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    head = {}
    embeddings = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def record(layer, hidden, keys, values):
        head[layer] = (keys[0].clone(), values[0].clone())

    model.model.run_rows(embeddings, positions, record, full=True, every_layer=True)
    return head


class _Portions:
    """Finished portions on disk, so that an interrupted encoding goes on where it stopped."""

    def __init__(self, directory, model, documents: list[str], batch_tokens: int, dtype: torch.dtype):
        digest = hashlib.sha256(json.dumps(model.fingerprint(), sort_keys=True).encode())
        digest.update(f"{model.config.memory_settings} {batch_tokens} {PORTION_TOKENS} {dtype}".encode())
        for text in documents:
            digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
        self.directory = Path(directory) / digest.hexdigest()[:24]
        self.directory.mkdir(parents=True, exist_ok=True)

    def load(self, number: int) -> dict[str, torch.Tensor] | None:
        path = self.directory / f"portion-{number:06d}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError:
            logger.warning(f"{path} is damaged; its documents are encoded again")
            return None

    def save(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.directory / f"portion-{number:06d}.safetensors"
        temporary = path.with_suffix(".part")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
