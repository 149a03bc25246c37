"""Needles in a memory: a made-up fact at each depth of real texts of each length, asked as `ask` asks.

Texts are cut into documents as ingestion does and encoded once, the shorter haystacks being the first
documents of the longest one. A cell encodes one document anew, the one that gets its fact.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from transformers.generation import StoppingCriteriaList

from msa_hf.asking import ask
from msa_hf.documents import Document, split_document
from msa_hf.evaluation.cache_comparison import StopWhen
from msa_hf.evaluation.haystack_memory import HaystackMemory
from msa_hf.evaluation.metrics import Estimate
from msa_hf.evaluation.needle_facts import KINDS, LONGEST, Fact, draw_fact, insert, tells, words
from msa_hf.modeling.generation_msa import RETRIEVALS
from msa_hf.modeling.memory_encoding import default_batch_tokens
from msa_hf.modeling.prompts_msa import document_prompt
from msa_hf.modeling.retrieval_msa import MODES, consensus
from msa_hf.packages import hotpotqa, squad
from msa_hf.store_ingestion import token_counter

LENGTHS = (10_000, 100_000)
DEPTHS = 5
PORTION_TOKENS = 4096  # encoded between two reports of progress, or some batches where these are larger


@dataclass(frozen=True)
class NeedleProgress:
    """How many tokens are encoded, of those that all lengths need together."""

    tokens: int
    total: int


@dataclass(frozen=True)
class NeedleCell:
    """One fact that was hidden and asked for.

    Attributes:
        length: what was asked for; tokens, documents: what the memory has. depth: 0.0 first to 1.0 last.
        found: whether the answer tells the fact. selected: whether the document that holds it, number
            `document`, was among those that the answer was given from; rank: its place among them.
        router_rank: its rank among all documents by the routers alone.
        seconds: of the question and its answer; encoding_seconds: of the one document.
    """

    length: int
    depth: float
    tokens: int
    documents: int
    kind: str
    fact: str
    question: str
    expected: str
    answer: str
    found: bool
    document: int
    selected: bool
    rank: int | None
    router_rank: int
    seconds: float
    encoding_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class NeedleSummary:
    """Fractions of facts found and of their documents selected, with 95 % Wilson intervals."""

    asked: int
    found: Estimate
    selected: Estimate


def needle_grid(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Document | str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: int | Sequence[float] = DEPTHS,
    *,
    kinds: Sequence[str] = KINDS,
    max_tokens: int = 256,
    bits: int | None = 4,
    seed: int = 0,
    retrieval: str = "auto",
    k: int | None = None,
    mode: str | None = None,
    max_new_tokens: int = 32,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[NeedleProgress | NeedleCell]:
    """Hides and asks for one fact per length and depth, the shortest length first.

    The same arguments give the same cells, but for their seconds. Until the first report, of no tokens, the
    model is not used.

    Args:
        model: a model with memory, in evaluation mode.
        texts: what facts are hidden in; by default `real_texts()`. No more are read than are needed.
        lengths: tokens of the haystacks; each has the fewest first documents that reach its length.
        depths: parts of the haystack, from 0.0 to 1.0, or how many, evenly spaced.
        kinds: of facts, in turns along both axes.
        max_tokens: limit of one document; room for a fact is kept within it.
        bits: of the memory, see `MemoryBank.pack`; None for vectors as they are.
        retrieval, k, mode, max_new_tokens: of `ask`.
        should_stop: asked between portions, tokens and cells; once it says yes, nothing more comes.

    Raises:
        ValueError: an argument is out of range, before anything is done; or the texts are too short, before
            anything is encoded.
    """
    lengths, depths = _checked_lengths(lengths), _checked_depths(depths)
    count = token_counter(tokenizer)
    room = max_tokens - count(f" {LONGEST}")
    if room < 1:
        raise ValueError(
            f"max_tokens must be above {max_tokens - room}, which a fact may take; got {max_tokens}"
        )
    for name, value, known in (
        ("bits", bits, (None, 1, 2, 3, 4)),
        ("retrieval", retrieval, RETRIEVALS),
        ("mode", mode, (None, *MODES)),
        *(("kinds", kind, KINDS) for kind in kinds or [None]),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
    for name, number in (("k", k), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    how = {"retrieval": retrieval, "k": k, "mode": mode, "max_new_tokens": max_new_tokens}
    grid = _Grid(model, tokenizer, list(kinds), bits, seed, should_stop or (lambda: False), how)
    return grid.run(texts, lengths, depths, room)


def real_texts(cache: str | None = None) -> Iterator[Document]:
    """SQuAD's 35 articles, then HotpotQA's paragraphs, each once: some nine million tokens."""
    for article in squad(cache)["data"]:
        body = "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])
        title = article["title"].replace("_", " ")
        yield Document(title, title, body)
    seen = set()
    for record in hotpotqa(cache):
        for title, sentences in record["context"]:
            body = "".join(sentences).strip()
            if (key := (title, body)) not in seen:
                seen.add(key)
                yield Document(title, title, body)


def summarize(cells: Sequence[NeedleCell]) -> NeedleSummary:
    """Over all cells. Raises ValueError without one."""
    if not cells:
        raise ValueError("cells must hold at least one; got none")
    found, selected = (sum(getattr(cell, name) for cell in cells) for name in ("found", "selected"))
    return NeedleSummary(len(cells), wilson(found, len(cells)), wilson(selected, len(cells)))


def wilson(successes: int, trials: int) -> Estimate:
    """A fraction with Wilson's 95 % interval, which stays honest where all or none succeed (Wilson 1927)."""
    z, share = 1.959964, successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


class _Grid:
    """One run over lengths and depths."""

    def __init__(self, model, tokenizer, kinds, bits, seed, stopped, ask_options):
        self.model, self.tokenizer, self.kinds, self.bits, self.seed = model, tokenizer, kinds, bits, seed
        self.stopped, self.ask_options = stopped, ask_options

    def run(
        self, texts: Iterable[Document | str] | None, lengths: list[int], depths: list[float], room: int
    ) -> Iterator[NeedleProgress | NeedleCell]:
        pieces = self._pieces(real_texts() if texts is None else texts, room, lengths[-1])
        if pieces is None:
            return
        counts = [tokens for _, tokens in pieces]
        ends = list(accumulate(counts))
        sizes = [next(i for i, end in enumerate(ends, 1) if end >= length) for length in lengths]
        taken = {word for text, _ in pieces for word in words(text)}
        haystack = HaystackMemory(self.model, self.tokenizer, [text for text, _ in pieces], counts, self.bits)
        portion = max(PORTION_TOKENS, 4 * default_batch_tokens(self.model.device))
        done = 0
        yield NeedleProgress(done, ends[-1])  # the texts are cut; from here on the model is needed
        for row, (length, size) in enumerate(zip(lengths, sizes)):
            while haystack.encoded < size:
                if self.stopped():
                    return
                done += haystack.encode_next(portion, size)
                yield NeedleProgress(done, ends[-1])
            for column, depth in enumerate(depths):
                if self.stopped():
                    return
                draw = random.Random(f"{self.seed} {length} {depth}")
                fact = draw_fact(self.kinds[(row + column) % len(self.kinds)], draw, taken)
                cell = self._cell(haystack, length, depth, fact, ends[:size])
                if self.stopped():  # what it said last may have been cut short
                    return
                yield cell

    def _pieces(
        self, texts: Iterable[Document | str], room: int, length: int
    ) -> list[tuple[str, int]] | None:
        """(text, tokens) of the fewest documents with `length` tokens together; None once it is to stop."""
        count = token_counter(self.tokenizer)
        style = self.model.config.prompt_format
        pieces: list[tuple[str, int]] = []
        total = 0
        for number, text in enumerate(texts):
            document = Document(str(number), "", text) if isinstance(text, str) else text
            if self.stopped():
                return None
            for piece in split_document(document, room, count):
                tokens = count(document_prompt(style, len(pieces), piece.content))
                pieces.append((piece.content, tokens))
                total += tokens
                if total >= length:
                    return pieces
        raise ValueError(f"lengths must not exceed the {total:,} tokens of the texts; got {length:,}")

    def _cell(
        self, haystack: HaystackMemory, length: int, depth: float, fact: Fact, ends: Sequence[int]
    ) -> NeedleCell:
        place, part = _place(ends, depth)
        start = time.perf_counter()
        text = insert(haystack.documents[place], fact.sentence, part)
        bank = haystack.with_document(len(ends), place, text)
        encoding = time.perf_counter() - start
        scores = self.model.route_questions([fact.question], bank, self.tokenizer)
        totals = consensus(scores, self.model.config.consensus_weights)[0]
        above = (totals > totals[place]).sum() + (totals[:place] == totals[place]).sum()
        reply = ask(
            self.model,
            self.tokenizer,
            bank,
            fact.question,
            stopping_criteria=StoppingCriteriaList([StopWhen(self.stopped)]),
            **self.ask_options,
        )
        read = [source.document for source in reply.sources]
        return NeedleCell(
            length=length,
            depth=depth,
            tokens=bank.num_tokens,
            documents=len(bank),
            kind=fact.kind,
            fact=fact.sentence,
            question=fact.question,
            expected=fact.answer,
            answer=reply.answer,
            found=tells(reply.answer, fact.answer),
            document=place,
            selected=place in read,
            rank=read.index(place) + 1 if place in read else None,
            router_rank=int(above) + 1,
            seconds=reply.seconds,
            encoding_seconds=encoding,
        )


def _place(ends: Sequence[int], depth: float) -> tuple[int, float]:
    """The document that holds the token at `depth`, and at which part of it; `ends` are running totals."""
    token = depth * ends[-1]
    place = next((i for i, end in enumerate(ends) if token < end), len(ends) - 1)
    start = ends[place - 1] if place else 0
    return place, (token - start) / max(1, ends[place] - start)


def _checked_lengths(lengths: Sequence[int]) -> list[int]:
    if not lengths:
        raise ValueError("lengths must name at least one; got none")
    for length in lengths:
        if length < 1:
            raise ValueError(f"lengths must be at least 1; got {length}")
    return sorted(set(lengths))


def _checked_depths(depths: int | Sequence[float]) -> list[float]:
    if isinstance(depths, int):
        if depths < 1:
            raise ValueError(f"depths must be at least 1; got {depths}")
        return [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    if not depths:
        raise ValueError("depths must name at least one; got none")
    for depth in depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths must lie from 0.0 to 1.0; got {depth}")
    return sorted(set(map(float, depths)))
