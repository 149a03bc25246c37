"""Memory Interleave: retrieval and generation in rounds (paper section 3.5, multi-hop questions).

Router-directed: the routers' consensus chooses documents, whose original text enters the prompt; the grown
context routes again until nothing new is found. Generative: the model writes document numbers itself, as
MSA-4B was trained to.
"""

import copy
import re
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from .cache_memory import MemoryCache, MemoryReader, top_documents
from .prompts_msa import (
    ANSWER_MARK,
    END_OF_DOCUMENTS,
    END_OF_RETRIEVAL,
    END_OF_TURN,
    RESPONSE,
    answer_prompt,
    clean_answer,
    injected_documents,
    injected_question,
    msa_prompt,
)
from .retrieval_msa import RetrievalRound, describe

TITLE_WORDS = 24  # of a text's first line that route in the next round


@dataclass
class Interleave:
    """Answers of a batch: new tokens per sample, their texts, and the rounds of retrieval."""

    tokens: list[torch.Tensor]
    answers: list[str]
    rounds: list[list[RetrievalRound]]


def router_interleave(
    model,
    questions: list[str],
    memory,
    tokenizer,
    *args,
    documents_per_round: int = 3,
    max_rounds: int = 2,
    max_documents: int = 4,
    mode: str | None = None,
    **generate_options,
) -> Interleave:
    """Answers each question from the original text of the documents that the routers choose.

    Args:
        documents_per_round: documents that one round looks at; those not yet in the context are new.
        max_rounds: rounds at most; retrieval also ends when a round finds nothing new.
        max_documents: documents in the prompt at most, the first found first.
        mode: "router", "lexical" or "fused", see `rank_documents`.
        generate_options: for `generate`; max_new_tokens counts the answer's tokens.
    """
    for name, value in (
        ("documents_per_round", documents_per_round),
        ("max_rounds", max_rounds),
        ("max_documents", max_documents),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    rounds: list[list[RetrievalRound]] = [[] for _ in questions]
    found: list[list[int]] = [[] for _ in questions]
    active = list(range(len(questions)))
    for number in range(max_rounds):
        queries = [
            questions[i]
            if not number
            else grown_query(questions[i], [memory.documents[d.id] for d in rounds[i][-1].documents])
            for i in active
        ]
        if not queries:
            break
        wanted = documents_per_round + max(len(found[i]) for i in active)
        ranked = model.rank_documents(queries, memory, k=wanted, mode=mode, tokenizer=tokenizer)
        remaining = []
        for i, query, documents in zip(active, queries, ranked):
            room = max_documents - len(found[i])
            new = [document for document in documents if document.id not in found[i]]
            new = new[: min(documents_per_round, room)]
            if new:
                rounds[i].append(RetrievalRound(query, new))
                found[i] += [document.id for document in new]
                if len(found[i]) < max_documents:
                    remaining.append(i)
        active = remaining
    texts = [[memory.documents[i] for i in ids] for ids in found]
    tokens, answers = answer_from(model, questions, texts, tokenizer, *args, **generate_options)
    return Interleave(tokens, answers, rounds)


def grown_query(question: str, documents: list[str]) -> str:
    """What routes after the first round: the question with the first line (the title) of each text found.

    Whole texts route worse: their own words outvote the question's (LOG.md).
    """
    titles = [" ".join(text.strip().partition("\n")[0].split()[:TITLE_WORDS]) for text in documents]
    return "\n".join([question, *titles])


def answer_from(
    model,
    questions: list[str],
    documents: list[list[str]],
    tokenizer,
    *args,
    max_new_tokens: int = 32,
    **generate_options,
) -> tuple[list[torch.Tensor], list[str]]:
    """Answers from original texts given in the prompt: the answers' tokens, and the answers.

    Args:
        documents: per question, most relevant first; as many are used as fit into the model's positions. An
            empty list asks without documents (closed book).
        max_new_tokens: answer tokens at most. generate_options: for `generate`.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    style, prefix = model.config.answer_style, ""
    if len(_tokens(tokenizer, answer_prompt(style, tokenizer, "", [])[0])) > room // 2:
        style = "chat"  # worked examples would leave no room for documents
    prompts = []
    for question, texts in zip(questions, documents):
        prefix, prompt = answer_prompt(style, tokenizer, question, texts)
        while texts and len(_tokens(tokenizer, prefix + prompt)) > room:
            texts = (
                texts[:-1]
                if len(texts) > 1
                else [texts[0][: len(texts[0]) // 2]]
                if len(texts[0]) > 64
                else []
            )
            prefix, prompt = answer_prompt(style, tokenizer, question, texts)
        prompts.append(prompt)
    rows = _tokens(tokenizer, prompts)
    ids, mask = left_pad([torch.tensor(row) for row in rows], pad_id(tokenizer), model.device)
    cache = None
    if prefix:
        shared = tokenizer(prefix, add_special_tokens=False, return_tensors="pt")["input_ids"].to(
            model.device
        )
        ids = torch.cat([shared.expand(len(ids), -1), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(ids), shared.shape[1]), mask], dim=1)
        config = generate_options.get("generation_config") or model.generation_config
        own_cache = generate_options.get("cache_implementation", config.cache_implementation)
        rows_stay = (
            generate_options.get("num_beams", 1) == generate_options.get("num_return_sequences", 1) == 1
        )
        if rows_stay and own_cache is None:
            cache = _prefix_cache(model, shared, len(ids))
    stop = StopAtNewline(tokenizer, ids.shape[1]) if style == "examples" else None
    criteria = StoppingCriteriaList(generate_options.pop("stopping_criteria", None) or [])
    options = {"pad_token_id": pad_id(tokenizer), "do_sample": False, **generate_options}
    sequences = model.generate(
        ids,
        *args,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList([*criteria, stop] if stop else criteria),
        **options,
    )
    tails = [_without_padding(row[ids.shape[1] :], tokenizer) for row in sequences]
    answers = [clean_answer(style, tokenizer.decode(row, skip_special_tokens=True)) for row in tails]
    return tails, answers


class StopAtNewline(StoppingCriteria):
    """Ends a row once its answer holds a newline after some text."""

    def __init__(self, tokenizer, start: int):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _prefix_cache(model, shared: torch.Tensor, batch: int) -> DynamicCache:
    """K/V of the prompt's part that all questions share, computed once per model and repeated over the
    batch."""
    key = (tuple(shared[0].tolist()), model.weights_key())
    if getattr(model, "_answer_prefix", (None,))[0] != key:
        with torch.no_grad():
            cache = model(shared, use_cache=True, logits_to_keep=1).past_key_values
        model._answer_prefix = (key, cache)
    cache = copy.deepcopy(model._answer_prefix[1])
    cache.batch_repeat_interleave(batch)
    return cache


def generative_interleave(
    model,
    questions: list[str],
    memory,
    tokenizer,
    *args,
    max_rounds: int = 8,
    tokens_per_round: int = 256,
    **generate_options,
) -> Interleave:
    """Lets the model name documents by number, injects their text, and continues until it answers (specs of
    MSA-4B).

    In every round the whole text is prefilled and routed afresh; the question and the texts injected last
    route.

    Args:
        max_rounds: rounds at most, the answering one included. tokens_per_round: new tokens of a round at
            most;
            `max_new_tokens`, if given, means the same.
    """
    if max_rounds < 1 or tokens_per_round < 1:
        raise ValueError(
            f"max_rounds and tokens_per_round must be at least 1; got {max_rounds} and {tokens_per_round}"
        )
    tokens_per_round = generate_options.pop("max_new_tokens", tokens_per_round)
    if generate_options.pop("num_return_sequences", 1) != 1:
        raise ValueError(
            "num_return_sequences must be 1 with generative retrieval: every sample has rounds of its own"
        )
    criteria = list(generate_options.pop("stopping_criteria", None) or [])
    dialogues = [_Dialogue(question, memory, tokenizer) for question in questions]
    for number in range(max_rounds):
        active = [dialogue for dialogue in dialogues if not dialogue.finished]
        if not active:
            break
        for dialogue in active:
            if 0 < number == max_rounds - 1 and not dialogue.answering:
                dialogue.close(END_OF_RETRIEVAL)
        ids, mask = left_pad([d.ids for d in active], pad_id(tokenizer), model.device)
        routing, _ = left_pad([d.routes for d in active], 0, model.device)
        cache = MemoryCache(MemoryReader(memory, model.config))
        sequences = model.generate(
            ids,
            *args,
            attention_mask=mask,
            question_mask=routing.bool(),
            past_key_values=cache,
            max_new_tokens=tokens_per_round,
            stopping_criteria=StoppingCriteriaList([*criteria, StopAtMarker(tokenizer, ids.shape[1])]),
            **{"do_sample": False, "pad_token_id": pad_id(tokenizer), **generate_options},
        )
        for row, dialogue in enumerate(active):
            scores = {layer: values[row : row + 1] for layer, values in cache.reader.scores.items()}
            dialogue.advance(sequences[row, ids.shape[1] :], scores, model.config)
    tokens = [torch.tensor(dialogue.written, dtype=torch.int64) for dialogue in dialogues]
    return Interleave(
        tokens, [dialogue.answer() for dialogue in dialogues], [dialogue.rounds for dialogue in dialogues]
    )


class StopAtMarker(StoppingCriteria):
    """Ends a row at the end of a document list, of retrieval or of the turn."""

    markers = (END_OF_DOCUMENTS, END_OF_RETRIEVAL, END_OF_TURN)

    def __init__(self, tokenizer, start: int):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        return torch.tensor([any(m in text for m in self.markers) for text in texts], device=input_ids.device)


class _Dialogue:
    """One sample of generative interleave: its text so far, which part of it routes, and its rounds."""

    def __init__(self, question: str, memory, tokenizer):
        self.question, self.memory, self.tokenizer = question, memory, tokenizer
        self.finished, self.answering = False, False
        self.written: list[int] = []
        self.answer_start = 0
        self.rounds: list[RetrievalRound] = []
        self.injected = ""
        parts = [(self._encode(text), label == 0) for text, label in msa_prompt(question)]
        self.parts: list[tuple[list[int], bool]] = parts
        self.fixed = len(parts)

    @property
    def ids(self) -> torch.Tensor:
        return torch.tensor([token for tokens, _ in self.parts for token in tokens], dtype=torch.int64)

    @property
    def routes(self) -> torch.Tensor:
        return torch.tensor([int(routes) for tokens, routes in self.parts for _ in tokens], dtype=torch.int64)

    def _encode(self, text: str) -> list[int]:
        return _tokens(self.tokenizer, text)

    def _append(self, tokens: list[int], routes: bool) -> None:
        self.parts.append((tokens, routes))

    def advance(self, generated: torch.Tensor, scores: dict[int, torch.Tensor], config) -> None:
        """Takes what the model wrote in this round and prepares the next one, or finishes."""
        tokens = _without_padding(generated, self.tokenizer)
        text = self.tokenizer.decode(tokens)
        self.written += tokens.tolist()
        self._append(tokens.tolist(), routes=False)
        if self.answering or END_OF_TURN in text:
            self.finished = True
        elif END_OF_RETRIEVAL in text:
            self.close()
        elif END_OF_DOCUMENTS not in text:
            self.close(END_OF_RETRIEVAL)  # the round ran out of tokens
        else:
            self._inject(named_documents(text, self.memory), scores, config)

    def close(self, marker: str = "") -> None:
        """Ends retrieval: from here on the model answers, with what the last round has selected."""
        self.answering, self.answer_start = True, len(self.written)
        self._append(self._encode(marker + injected_question(self.question)), routes=False)

    def _inject(self, chosen: list[int], scores: dict[int, torch.Tensor], config) -> None:
        """Appends the texts of the named documents; with the question, they alone route in the next round."""
        known = describe(self.memory, scores, 0, config.consensus_weights, None, [(i, None) for i in chosen])
        selected = {
            layer: [(int(i), float(values[0, i])) for i in top_documents(values, config.top_k_documents)[0]]
            for layer, values in scores.items()
        }
        self.rounds.append(RetrievalRound(self.injected or self.question, known, selected))
        numbers = self.memory.numbers or range(len(self.memory))
        texts = [self.memory.documents[i] for i in chosen]
        self.injected = injected_documents([numbers[i] for i in chosen], texts)
        self.parts = [
            (part, routes and index < self.fixed) for index, (part, routes) in enumerate(self.parts)
        ]
        self._append(self._encode(self.injected), routes=True)

    def answer(self) -> str:
        text = self.tokenizer.decode(self.written[self.answer_start :], skip_special_tokens=False)
        text = text.rpartition(ANSWER_MARK)[2]
        for marker in (RESPONSE, END_OF_TURN, END_OF_DOCUMENTS):
            text = text.replace(marker, " ")
        return text.strip()


def named_documents(text: str, memory) -> list[int]:
    """The different documents that `text` names by number, as [12], in the memory's order."""
    written = set(map(int, re.findall(r"\[(\d{1,12})\]", text)))
    if memory.numbers is None:
        return sorted(number for number in written if number < len(memory))
    return [index for index, number in enumerate(memory.numbers) if number in written]


def left_pad(rows: list[torch.Tensor], value: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] padded on the left, and its attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return ids.to(device), mask.long().to(device)


def _tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad_id(tokenizer) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else pad


def _without_padding(row: torch.Tensor, tokenizer) -> torch.Tensor:
    """`row` without the padding at its end; an end-of-sequence token that also serves as padding stays
    once."""
    row = row.cpu()
    keep = len(row)
    while keep and int(row[keep - 1]) == pad_id(tokenizer):
        keep -= 1
    if keep < len(row) and pad_id(tokenizer) == tokenizer.eos_token_id:
        keep += 1
    return row[:keep]
