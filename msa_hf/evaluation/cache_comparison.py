"""One question side by side: the dense cache and quantised ones read the same prompt and answer it.

The prompt is the one that `ask` writes, filled up with further ranked documents, so that most of it has left
the recent window and is read from codes. Its last tokens go through the cache one at a time, as decoding
does: they are timed, and their logits and those of the dense cache's answer are compared with the dense ones.
So the answer, too, comes from a question that was read from codes; generate(), which prefills a prompt in one
piece, may answer otherwise with the same cache. N positions compared, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from msa_hf.evaluation.cache_protocol import diverge
from msa_hf.evaluation.cache_systems import (
    DENSE,
    CacheSystem,
    cache_systems,
    dense_system,
    settled_bytes,
    using_attention,
)
from msa_hf.evaluation.comparison_prompt import filled_prompt, ranked_texts, token_ids
from msa_hf.modeling.interleave_msa import StopAtNewline, pad_id
from msa_hf.modeling.prompts_msa import clean_answer

SYSTEMS = (DENSE, "4bit", "3bit", "2.7bit", "k2v2", "1.8bit")
SHORTEST_PROMPT = 3  # tokens: one is prefilled, one is forced, and the last one asks


@dataclass(frozen=True)
class CacheAnswer:
    """What one cache answered, and what it cost.

    Attributes:
        kl: mean KL to the dense cache's next-token distributions in nats; agreement: fraction of positions
            with its first token; compared: positions of both, those of the context and of the dense answer.
        prompt_tokens: of the whole prompt; packed_tokens: those that were read from codes.
        bits: per number of the packed tokens, scales and means included; the model's own of the dense cache,
            None where nothing was packed.
        bytes: held before the answer: "total"; "reserved", room for coming tokens that is part of it;
            "bfloat16", what the same tokens would take; of a quantised cache "codes", "scales", "means",
            "window", "exact", "transforms" (of the model, whatever the length) and "other", too.
        seconds_per_token: median of single-token steps; speed: the dense cache's over this one's. The caches
            run one after the other, so other work on the machine shows in it; `msa-hf eval cache --parts
            speed` takes turns.
    """

    system: str
    answer: str
    same_answer: bool
    kl: float
    agreement: float
    compared: int
    prompt_tokens: int
    packed_tokens: int
    bits: float | None
    bytes: dict[str, int]
    prefill_seconds: float
    seconds_per_token: float
    speed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare_caches(
    model: Any,
    tokenizer: Any,
    question: str,
    context: Any,
    systems: Sequence[str | CacheSystem] = SYSTEMS,
    *,
    context_tokens: int = 2048,
    found: Sequence[int] = (),
    max_new_tokens: int = 32,
    forced_tokens: int = 64,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[CacheAnswer]:
    """Answers one question with each cache in turn, the dense one first; a record as soon as it is there.

    Only one cache is held at a time, and the dense logits [N, V]. While a record is made the model reads
    caches with another attention, so nobody else may use it; between records it is as it was.

    Args:
        model: any causal language model.
        context: a memory or store that `model` made, whose documents are ranked for the question; or texts,
            most relevant first; or a str, the prompt as it stands.
        systems: names as of `cache_systems`, or systems; the dense one is added where it is not named.
        context_tokens: up to which documents are added to the prompt.
        found: numbers of documents of the memory that come first, such as the sources of an answer.
        max_new_tokens: answer tokens at most. forced_tokens: last ones of the prompt that are compared.
        should_stop: asked between steps; once it says yes, nothing more comes.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit; before anything is computed.
    """
    for name, value in (
        ("context_tokens", context_tokens),
        ("max_new_tokens", max_new_tokens),
        ("forced_tokens", forced_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    chosen = _dense_first(systems)
    style, prompt = "chat", context
    if not isinstance(context, str):
        if not question.strip():
            raise ValueError(f"question must not be empty; got {question!r}")
        room = min(context_tokens, model.config.max_position_embeddings - max_new_tokens)
        texts = (
            context
            if isinstance(context, Sequence)
            else ranked_texts(model, tokenizer, question, context, room, found)
        )
        style = getattr(model.config, "answer_style", style)
        style, prompt = filled_prompt(tokenizer, style, question.strip(), texts, room)
    ids = token_ids(tokenizer, prompt)
    limit = model.config.max_position_embeddings - max_new_tokens
    if not SHORTEST_PROMPT <= len(ids) <= limit:
        raise ValueError(
            f"the prompt must have {SHORTEST_PROMPT} to {limit} tokens (the model's positions less "
            f"max_new_tokens={max_new_tokens}); got {len(ids)}"
        )
    run = _Run(model, tokenizer, ids, style, max_new_tokens, min(forced_tokens, len(ids) - 2), should_stop)
    return run.answers(chosen)


def render(answers: Sequence[CacheAnswer]) -> str:
    """The records as a text table."""
    if not answers:
        return "no cache was asked"
    first = answers[0]
    lines = [
        f"Prompt of {first.prompt_tokens:,} tokens; KL to dense (nats) and equal first tokens over "
        f"{first.compared} positions, bits of packed tokens, bytes held, share of bfloat16, s per token",
        f"{'':8} {'KL':>8} {'equal':>6} {'bits':>6} {'bytes':>13} {'share':>6} {'seconds':>8} {'speed':>6}",
    ]
    for row in answers:
        bits = "" if row.bits is None else f"{row.bits:.2f}"
        total, share = row.bytes["total"], row.bytes["total"] / row.bytes["bfloat16"]
        lines.append(
            f"{row.system:8} {row.kl:>8.5f} {row.agreement:>6.3f} {bits:>6} {total:>13,} {share:>6.3f} "
            f"{row.seconds_per_token:>8.3f} {row.speed:>6.2f}  {' '.join(row.answer.split())}"
        )
    return "\n".join(lines)


def _dense_first(systems: Sequence[str | CacheSystem]) -> list[CacheSystem]:
    own = [cache_systems([system])[0] if isinstance(system, str) else system for system in systems]
    names = [system.name for system in own]
    if len(set(names)) < len(names):
        raise ValueError(f"systems must have different names; got {', '.join(names)}")
    return [dense_system(), *(system for system in own if system.name != DENSE)]


class _Stopped(Exception):
    """The caller wants no more."""


@dataclass
class _Decoded:
    """What one system did: logits [N, V] of all positions, answer, sizes and seconds."""

    logits: torch.Tensor
    tokens: list[int]
    answer: str
    sizes: dict[str, int]
    packed_tokens: int
    bits: float | None
    prefill_seconds: float
    seconds_per_token: float


class _Run:
    """One prompt that several systems read."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        style: str,
        max_new_tokens: int,
        forced: int,
        should_stop: Callable[[], bool] | None,
    ):
        self.model, self.tokenizer, self.style = model, tokenizer, style
        self.ids = torch.tensor([ids], device=model.device)
        self.max_new_tokens, self.forced = max_new_tokens, forced
        self.stopped = should_stop or (lambda: False)

    def answers(self, systems: Sequence[CacheSystem]) -> Iterator[CacheAnswer]:
        dense: _Decoded | None = None
        for system in systems:
            try:
                decoded = self._decode(system, None if dense is None else dense.tokens)
            except _Stopped:
                return
            reference = dense = dense or decoded
            yield self._record(system.name, decoded, reference)

    def _record(self, name: str, decoded: _Decoded, dense: _Decoded) -> CacheAnswer:
        targets = [*self.ids[0, -self.forced :].tolist(), *dense.tokens]
        compared = diverge(iter([decoded.logits]), dense.logits, targets)
        return CacheAnswer(
            system=name,
            answer=decoded.answer,
            same_answer=decoded.tokens == dense.tokens,
            kl=statistics.fmean(compared.kl),
            agreement=statistics.fmean(compared.agrees),
            compared=len(compared.kl),
            prompt_tokens=self.ids.shape[1],
            packed_tokens=decoded.packed_tokens,
            bits=decoded.bits,
            bytes=decoded.sizes,
            prefill_seconds=decoded.prefill_seconds,
            seconds_per_token=decoded.seconds_per_token,
            speed=dense.seconds_per_token / decoded.seconds_per_token,
        )

    @torch.inference_mode()
    def _decode(self, system: CacheSystem, dense_answer: list[int] | None) -> _Decoded:
        """Prompt, answer, and the dense answer through a new cache. Raises _Stopped."""
        start = self.ids.shape[1] - 1 - self.forced
        with using_attention(self.model, system.attention):
            cache = system.make(self.model.config)
            _, prefill = self._step(cache, self.ids[:, :start])
            steps = [self._step(cache, self.ids[:, i : i + 1]) for i in range(start, start + self.forced)]
            sizes, packed, bits = self._sizes(cache)
            tokens, logits = self._answer(cache)
            if dense_answer is not None:
                logits = self._along(cache, tokens, logits, dense_answer)
        answer = clean_answer(self.style, self.tokenizer.decode(tokens, skip_special_tokens=True))
        return _Decoded(
            torch.stack([*(row for row, _ in steps), *logits]).float(),
            tokens,
            answer,
            sizes,
            packed,
            bits,
            prefill,
            statistics.median(seconds for _, seconds in steps),
        )

    def _step(self, cache: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logits [V] after tokens [1, T], and the seconds that they took."""
        if self.stopped():
            raise _Stopped
        begin = self._clock()
        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].cpu(), self._clock() - begin

    def _clock(self) -> float:
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return time.perf_counter()

    def _answer(self, cache: Any) -> tuple[list[int], list[torch.Tensor]]:
        """The greedy answer as `ask` gets it, and the logits [V] that each of its tokens was chosen by."""
        criteria = [StopWhen(self.stopped)]
        if self.style == "examples":
            criteria.append(StopAtNewline(self.tokenizer, self.ids.shape[1]))
        output = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=pad_id(self.tokenizer),
            stopping_criteria=StoppingCriteriaList(criteria),
            output_logits=True,
            return_dict_in_generate=True,
        )
        if self.stopped():
            raise _Stopped
        return output.sequences[0, self.ids.shape[1] :].tolist(), [row[0].cpu() for row in output.logits]

    def _along(
        self, cache: Any, own: list[int], logits: list[torch.Tensor], dense: list[int]
    ) -> list[torch.Tensor]:
        """Logits [V] at every token of the dense answer: own ones while the answers agree, then forced."""
        shared = next((i for i, pair in enumerate(zip(own, dense)) if pair[0] != pair[1]), None)
        if shared is None:
            return logits[: len(dense)]
        cache.crop(shared + 1 - len(own))
        rest = torch.tensor([dense[shared:-1]], device=self.ids.device)
        return [
            *logits[: shared + 1],
            *(self._step(cache, rest[:, i : i + 1])[0] for i in range(rest.shape[1])),
        ]

    def _sizes(self, cache: Any) -> tuple[dict[str, int], int, float | None]:
        """Bytes by what they are for, packed tokens, and bits per number of these."""
        if not hasattr(cache, "report"):
            settled = settled_bytes(cache, list(self.model.parameters()))
            width = 8 * self.model.dtype.itemsize
            return {"total": settled, "reserved": 0, "bfloat16": settled * 16 // width}, 0, float(width)
        report = cache.report()
        parts = {
            "codes": report.key_codes + report.value_codes,
            "scales": report.key_scales + report.value_scales,
            "means": report.means,
            "window": report.window,
            "exact": report.exact,
            "transforms": report.transforms,
            "reserved": report.reserved,
        }
        sizes = {"total": report.total, "bfloat16": report.dense, **parts}
        sizes["other"] = report.total - sum(parts.values())
        return sizes, report.packed_tokens, report.bits if report.packed_tokens else None


class StopWhen(StoppingCriteria):
    """Ends generation once a function says so."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), bool(self.stopped()), device=input_ids.device)
