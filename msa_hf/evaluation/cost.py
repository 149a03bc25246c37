"""Cost of memory as ratios within one run: encoding speed, time to first token, peak memory, bytes per token.

Nothing is reported unless it is right: without memory the model must give the plain backbone's logits, the
timed encoding must give the bank of pooled keys and values that the plain backbone's own cache gives, and the
first token must be the same every time. Repetitions alternate between the two sides of a ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from msa_hf.evaluation.environment import Environment, describe_environment
from msa_hf.evaluation.peak_memory import EncodingMemory, measure_encoding
from msa_hf.modeling.memory_encoding import default_batch_tokens, length_batches, pad_rows, tokenize_documents


@dataclass(frozen=True)
class Timing:
    """Median seconds of several repetitions, with the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def __str__(self) -> str:
        return f"{self.median:.3f} s [{self.fastest:.3f}, {self.slowest:.3f}]"


@dataclass(frozen=True)
class CostReport:
    """Ratios above 1 favour memory in `encoding_ratio`, and cost time in `first_token_ratio`."""

    encoded_tokens: int
    encoding: Timing  # encode_memory
    backbone: Timing  # the plain backbone's forward over the same batches, without lm_head
    encoding_ratio: float  # tokens/s of encode_memory over tokens/s of the backbone
    layers_encoded: int  # encoding stops after the last router layer
    layers: int
    memory_documents: int
    memory_tokens: int
    prompt_tokens: int
    first_token_with_memory: Timing
    first_token_without: Timing
    first_token_ratio: float
    bank_bytes_per_token: float
    bank_error: float  # largest relative RMS difference of pooled K, V to the backbone's own
    logits_error: float  # largest absolute difference to the plain backbone without memory
    process: EncodingMemory | None
    environment: Environment

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


def evaluate_cost(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    memory: Any = None,
    *,
    question: str = "Which documents in this memory tell of two people who met at the same place?",
    checkpoint: str | Path | None = None,
    sample: int = 128,
    repetitions: int = 5,
    batch_tokens: int | None = None,
) -> CostReport:
    """Measures `model` on `documents`.

    Encoding is timed on the first `sample` documents. Time to first token is that of a question over `memory`
    (None: over a bank of the sample) by pooled attention. With a `checkpoint` folder, ALL documents are
    encoded once more in a process of its own to read its peak memory. Raises RuntimeError for a wrong result.
    """
    texts = list(documents)[:sample]
    encoding, backbone, bank, errors = time_encoding(
        model, tokenizer, texts, question, repetitions, batch_tokens
    )
    memory = bank if memory is None else memory
    inputs = tokenizer(question, return_tensors="pt", add_special_tokens=False).to(model.device)
    with_memory, without = time_first_token(model, tokenizer, inputs, memory, repetitions)
    process = None
    if checkpoint is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        process = measure_encoding(checkpoint, documents, batch_tokens=batch_tokens, dtype=dtype)
    return CostReport(
        encoded_tokens=int(bank.num_tokens),
        encoding=encoding,
        backbone=backbone,
        encoding_ratio=backbone.median / encoding.median,
        layers_encoded=max(bank.router_layers) + 1,
        layers=model.config.num_hidden_layers,
        memory_documents=len(memory),
        memory_tokens=int(memory.num_tokens),
        prompt_tokens=inputs["input_ids"].shape[1],
        first_token_with_memory=with_memory,
        first_token_without=without,
        first_token_ratio=with_memory.median / without.median,
        bank_bytes_per_token=float(memory.stats()["vector_bytes_per_token"]),
        bank_error=errors["bank"],
        logits_error=errors["logits"],
        process=process,
        environment=describe_environment(model.device),
    )


def time_encoding(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    question: str,
    repetitions: int,
    batch_tokens: int | None,
) -> tuple[Timing, Timing, Any, dict[str, float]]:
    """Timings of `encode_memory` and of the plain backbone over the same texts, the bank, the errors."""
    plain = plain_backbone(model)
    batches = document_batches(model, tokenizer, texts, batch_tokens)
    bank = model.encode_memory(list(texts), tokenizer, batch_tokens=batch_tokens)
    errors = {
        "logits": check_logits(model, plain, tokenizer, question),
        "bank": check_bank(bank, plain.model, tokenizer),
    }
    runs = [
        lambda: model.encode_memory(list(texts), tokenizer, batch_tokens=batch_tokens),
        lambda: run_backbone(plain.model, batches),
    ]
    encoding, backbone = alternate(runs, repetitions, model.device)
    return encoding, backbone, bank, errors


def time_first_token(
    model: Any, tokenizer: Any, inputs: Any, memory: Any, repetitions: int
) -> tuple[Timing, Timing]:
    """Timings of one greedy token by pooled attention over `memory`, and of the same without memory."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}

    def first(**extra: Any) -> None:
        out = model.generate(
            **inputs, **extra, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        seen[bool(extra)].add(int(out.sequences[0, -1]))

    with_memory = {"memory": memory, "tokenizer": tokenizer, "retrieval": "attention"}
    timings = alternate([lambda: first(**with_memory), first], repetitions, model.device)
    if any(len(tokens) != 1 for tokens in seen.values()):
        raise RuntimeError(f"the first token is not the same every time: {seen}")
    return timings[0], timings[1]


def plain_backbone(model: Any) -> Any:
    """The transformers model that `model` was converted from, on the same weight tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.config.backbone_type)
    known = set(config.to_dict()) - {"model_type", "architectures", "transformers_version", "layer_types"}
    for name, value in model.config.to_dict().items():
        if name in known:
            setattr(config, name, value)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".router_" not in name}
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(
            f"not the weights of a {config.model_type}: {missing[:3]} missing, {unexpected[:3]} left"
        )
    plain.tie_weights()
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config).to(model.device)
    return plain.eval()


def document_batches(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_tokens: int | None
) -> list[tuple]:
    """Right-padded (input_ids, attention_mask) [B, T]: the batches that `encode_memory` makes."""
    tokens = tokenize_documents(list(texts), tokenizer, model.config.prompt_format)
    batches = []
    budget = batch_tokens or default_batch_tokens(model.device)
    for rows in length_batches([len(row) for row in tokens], budget):
        ids, lengths = pad_rows([tokens[row] for row in rows], model.device)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batches.append((ids, mask.long().to(model.device)))
    return batches


@torch.inference_mode()
def run_backbone(backbone: Any, batches: Sequence[tuple]) -> None:
    """Forward of the whole backbone over the batches, nothing kept."""
    for tokens, mask in batches:
        backbone(tokens, attention_mask=mask, use_cache=False)


@torch.inference_mode()
def check_logits(model: Any, plain: Any, tokenizer: Any, text: str, tolerance: float = 1e-5) -> float:
    """Largest difference of the logits without memory to the plain backbone's; RuntimeError if too large."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    error = float((ours - theirs).abs().max())
    bound = (
        tolerance
        if model.dtype == torch.float32
        else torch.finfo(model.dtype).eps * float(theirs.abs().max())
    )
    if not error <= bound:
        raise RuntimeError(
            f"without memory the logits differ from the backbone's by {error:.2e}, above {bound:.2e}"
        )
    return error


@torch.inference_mode()
def check_bank(bank: Any, backbone: Any, tokenizer: Any, documents: int = 4) -> float:
    """Largest relative RMS error of the bank's K and V against chunk means of the plain backbone's own cache.

    Raises RuntimeError beyond 1e-4 in float32, and beyond twice the precision of a shorter dtype.
    """
    worst = 0.0
    for number in range(min(documents, len(bank))):
        ids = tokenizer(bank.documents[number], return_tensors="pt", add_special_tokens=False)["input_ids"]
        cache = backbone(ids.to(backbone.device), use_cache=True).past_key_values
        for layer in bank.router_layers:
            keys, values, _ = bank.gather(layer, [torch.tensor([number])])
            pairs = ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values))
            for pooled, states in pairs:
                expected = torch.stack(
                    [part.float().mean(2) for part in states.split(bank.settings.chunk_size, dim=2)], dim=2
                )
                error = (pooled.float().to(expected.device) - expected).square().mean().sqrt()
                worst = max(worst, float(error / expected.square().mean().sqrt()))
    bound = max(1e-4, 2 * torch.finfo(backbone.dtype).eps)
    if not worst <= bound:
        raise RuntimeError(
            f"the bank differs from the backbone's pooled cache by {worst:.2e}, above {bound:.2e}"
        )
    return worst


def alternate(
    runs: Sequence[Callable[[], None]], repetitions: int, device: torch.device | str = "cpu"
) -> list[Timing]:
    """Timings of several functions that take turns, after one unmeasured turn each."""
    if repetitions < 1:
        raise ValueError(f"repetitions must be >= 1, got {repetitions}")
    cuda = torch.device(device).type == "cuda"
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(repetitions + 1):
        for number, run in enumerate(runs):
            if cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize(device)
            if turn:
                seconds[number].append(time.perf_counter() - start)
    return [Timing.of(row) for row in seconds]


def render(report: CostReport) -> str:
    """The report as text."""
    tokens = report.encoded_tokens
    lines = [
        "Cost of memory",
        str(report.environment),
        f"verified: logits without memory within {report.logits_error:.1e} of the plain backbone,",
        f"          bank within {report.bank_error:.1e} (relative RMS) of its pooled cache",
        "",
        f"encoding {tokens:,} tokens (median [fastest, slowest] of {report.encoding.repetitions}):",
        f"  encode_memory          {report.encoding}  {tokens / report.encoding.median:,.0f} tokens/s",
        f"  plain backbone         {report.backbone}  {tokens / report.backbone.median:,.0f} tokens/s",
        f"  ratio of speeds        {report.encoding_ratio:.2f}  (encoding runs {report.layers_encoded} of "
        f"{report.layers} layers, and tokenizes and pools)",
        f"first token of a {report.prompt_tokens}-token prompt, memory of {report.memory_tokens:,} tokens "
        f"({report.memory_documents:,} documents):",
        f"  with memory            {report.first_token_with_memory}",
        f"  without                {report.first_token_without}",
        f"  ratio of times         {report.first_token_ratio:.2f}",
        f"bank: {report.bank_bytes_per_token:,.0f} bytes per token",
    ]
    if report.process is not None:
        process = report.process
        sizes = (process.peak_bytes, process.loaded_bytes, process.bank_bytes)
        peak, loaded, bank = (size / 2**30 for size in sizes)
        lines.append(
            f"encoding {process.tokens:,} tokens in a fresh process: {process.seconds:,.0f} s, "
            f"peak {peak:.2f} GiB ({loaded:.2f} GiB before encoding, bank {bank:.2f} GiB)"
        )
    return "\n".join(lines)
