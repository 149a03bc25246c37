"""encode_memory and generate(memory=...): pooled attention, router-directed and generative interleave (paper
section 3.5)."""

from dataclasses import dataclass

import torch
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .cache_memory import MemoryCache, MemoryReader
from .cache_turboquant import TurboQuantCache
from .interleave_msa import Interleave, answer_from, generative_interleave, router_interleave
from .memory_bank import MemoryBank
from .memory_encoding import encode_documents, pad_rows
from .retrieval_msa import MODES, RankedDocument, RetrievalRound, consensus, describe, lexical_scores

logger = logging.get_logger(__name__)
RETRIEVALS = ("auto", "attention", "router", "generative")
UNTRAINED = (
    "The routers of this model are not trained, so which documents it reads is left to chance. "
    "Train them with `msa-hf train-router`, or load a router adapter."
)


@dataclass
class MemoryGenerateOutput(ModelOutput):
    """What `generate(memory=..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: [B, T] the given input_ids, then the answer's tokens (padded on the right).
        answers: the answers' texts; None where no tokenizer is known.
        rounds: per sample, the rounds of retrieval with the documents used and their scores.
        retrieval: "attention", "router" or "generative".
    """

    sequences: torch.LongTensor | None = None
    answers: list[str] | None = None
    rounds: list[list[RetrievalRound]] | None = None
    retrieval: str | None = None


class MSAGenerationMixin(GenerationMixin):
    """The part of `MSAForCausalLM` that makes and reads memories."""

    def encode_memory(self, documents: list[str], tokenizer, **options) -> MemoryBank:
        """Encodes `documents` into a memory: every document alone, positions from 0, pooled per chunk (paper
        section 3.2).

        Args:
            documents: texts; an empty list and empty texts are allowed. tokenizer: the model's.
            batch_tokens (`int`): padded tokens run through the model at once. By default 16384, but one
                document at a time on a CPU, where its vectors are then the same bits in every memory.
            progress (`bool`): show a progress bar.
            resume_dir (`str`): keep finished batches there, so that an interrupted call goes on where it
                stopped.
            metadata (`dict`): JSON-serialisable notes kept with the memory.
            means (`dict`): of keys and values, where `memory_encoding.typical_means` is known already.
            numbers (`list[int]`): by which the prompt format "msa" calls the documents; default 0, 1, 2 ...

        Raises:
            ValueError: a document is not a text or is longer than the model's positions.
        """
        return encode_documents(self, documents, tokenizer, **options)

    @torch.no_grad()
    def route_questions(
        self, questions: list[str], memory: MemoryBank, tokenizer=None
    ) -> dict[int, torch.Tensor]:
        """Scores [B, N] of all documents in each router layer, from the questions' tokens alone (blind to
        the memory)."""
        memory = self._checked_memory(memory)
        tokenizer = _tokenizer(tokenizer, memory)
        rows = [
            torch.tensor(ids, dtype=torch.int64)
            for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]
        ]
        for row, question in zip(rows, questions):
            if not len(row):
                raise ValueError(f"a question must have at least one token; got {question!r}")
        ids, lengths = pad_rows(rows, self.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
        reader = MemoryReader(memory, self.config)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        position_embeddings = self.model.rotary_emb(
            self.model.embed_tokens(ids[:, :1]), position_ids=positions
        )

        def route(layer, hidden, keys, values):
            attention = self.model.layers[layer].self_attn
            reader.select(layer, attention.router_queries(hidden, position_embeddings), mask)

        self.model.encode(ids, route)
        return reader.scores

    def rank_documents(
        self, questions: list[str], memory: MemoryBank, k: int = 16, mode: str | None = None, tokenizer=None
    ) -> list[list[RankedDocument]]:
        """The k best documents for each question.

        Args:
            mode: "router" (the layers' consensus), "lexical" (BM25) or "fused" (reciprocal ranks of both),
                see `retrieval_msa.rank`. By default "fused" with `config.lexical_prior` ("lexical" while the
                routers are untrained), else "router".
        """
        mode = mode or self._default_mode()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        memory = self._checked_memory(memory)
        if not len(memory) or not questions:
            return [[] for _ in questions]
        scores = self.route_questions(questions, memory, tokenizer)
        ranked = []
        for row, question in enumerate(questions):
            lexical = lexical_scores(memory, question, k) if mode != "router" else None
            ranked.append(
                describe(memory, scores, row, self.config.consensus_weights, lexical, mode=mode, k=k)
            )
        return ranked

    def _default_mode(self) -> str:
        if not self.config.lexical_prior:
            return "router"
        return "fused" if self.config.routers_trained else "lexical"

    def answer_from(
        self, questions: list[str], documents: list[list[str]], tokenizer, **options
    ) -> list[str]:
        """Answers from original texts, which memory has chosen or you have; see `interleave_msa.answer_from`.

        Args:
            documents: per question, most relevant first; an empty list is closed book. options: for
                `generate`.
        """
        if len(documents) != len(questions):
            raise ValueError(
                f"documents must have one list per question ({len(questions)}); got {len(documents)}"
            )
        return answer_from(self, questions, documents, tokenizer, **options)[1]

    def generate(self, inputs: torch.Tensor | None = None, *args, memory: MemoryBank | None = None, **kwargs):
        """As `GenerationMixin.generate`; with `memory`, answers from it.

        Args:
            memory: from `encode_memory` or `MemoryBank.from_pretrained`, or a `MemoryStore`; None is exactly
                the backbone's generate.
            retrieval (`str`, default "auto"): "attention" attends to the pooled chunks of the selected
                documents, as trained MSA checkpoints need; "router" lets the routers choose documents whose
                original text enters the prompt (`input_ids` is then the bare question); "generative" lets
                the model name documents (MSA-4B's prompts;
                bare question, too); "auto" is `config.retrieval`.
            tokenizer: needed by "router" and "generative" unless the memory keeps one.
            top_k_documents (`int`): with "attention", documents that each router layer selects.
            question_mask (`[B, T]` bool): with "attention", the tokens that route; by default all but
                padding.
            documents_per_round, max_rounds, mode: of "router", see `interleave_msa.router_interleave`.
            tokens_per_round, max_rounds: of "generative", see `interleave_msa.generative_interleave`.

        Returns:
            As without memory; with `return_dict_in_generate=True` a `MemoryGenerateOutput`.
        """
        if memory is None:
            return super().generate(inputs, *args, **kwargs)
        retrieval = kwargs.pop("retrieval", "auto")
        if retrieval not in RETRIEVALS:
            raise ValueError(f"retrieval must be one of {', '.join(RETRIEVALS)}; got {retrieval!r}")
        retrieval = self.config.retrieval if retrieval == "auto" else retrieval
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise ValueError(
                "input_ids must be given with memory; inputs_embeds have no text to retrieve with"
            )
        memory = self._checked_memory(memory)
        if not self.config.routers_trained:
            logger.warning(UNTRAINED)
        as_dict = kwargs.pop("return_dict_in_generate", False)
        if retrieval == "attention":
            return self._generate_attending(input_ids, memory, as_dict, *args, **kwargs)
        output = self._generate_interleaved(input_ids, memory, retrieval, *args, **kwargs)
        return output if as_dict else output.sequences

    def _generate_attending(self, input_ids, memory: MemoryBank, as_dict: bool, *args, **kwargs):
        if kwargs.get("use_cache") is False:
            raise ValueError(
                "use_cache must not be False with memory: the cache holds what the question has selected"
            )
        cache, top_k = kwargs.pop("past_key_values", None), kwargs.pop("top_k_documents", None)
        if not getattr(cache, "is_memory_cache", False):
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "past_key_values must be empty when a memory is first read; it already holds tokens"
                )
            cache = MemoryCache(MemoryReader(memory, self.config, top_k=top_k), cache)
        tokenizer = kwargs.get("tokenizer") or memory.tokenizer
        sequences = super().generate(input_ids, *args, past_key_values=cache, **kwargs)
        if not as_dict:
            return sequences
        reader = cache.reader
        rounds = [[self._attended(reader, row)] for row in range(len(next(iter(reader.scores.values()))))]
        answers = None
        if tokenizer is not None:
            answers = tokenizer.batch_decode(sequences[:, input_ids.shape[1] :], skip_special_tokens=True)
        return MemoryGenerateOutput(sequences, answers, rounds, "attention")

    def _attended(self, reader: MemoryReader, row: int) -> RetrievalRound:
        """What one sample selected: by layer, and every document of it by consensus."""
        selected = {
            layer: [(int(i), float(reader.scores[layer][row, i])) for i in ids[row]]
            for layer, ids in reader.selected.items()
        }
        chosen = {i for pairs in selected.values() for i, _ in pairs}
        weights = self.config.consensus_weights
        totals = consensus(
            {layer: scores[row : row + 1] for layer, scores in reader.scores.items()}, weights
        )[0]
        ranking = sorted(((i, float(totals[i])) for i in chosen), key=lambda item: (-item[1], item[0]))
        return RetrievalRound("", describe(reader.bank, reader.scores, row, weights, None, ranking), selected)

    def _generate_interleaved(self, input_ids, memory: MemoryBank, retrieval: str, *args, **kwargs):
        tokenizer = _tokenizer(kwargs.pop("tokenizer", None), memory)
        mask = kwargs.pop("attention_mask", None)
        rows = [
            row if mask is None else row[keep.bool()]
            for row, keep in zip(input_ids, input_ids if mask is None else mask)
        ]
        questions = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        interleave = router_interleave if retrieval == "router" else generative_interleave
        result: Interleave = interleave(self, questions, memory, tokenizer, *args, **kwargs)
        repeats = len(result.tokens) // len(questions)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        tails = torch.nn.utils.rnn.pad_sequence(result.tokens, batch_first=True, padding_value=pad)
        sequences = torch.cat([input_ids.repeat_interleave(repeats, 0), tails.to(input_ids)], dim=1)
        return MemoryGenerateOutput(sequences, result.answers, result.rounds, retrieval)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Adds cache_implementation="quantized", cache_config={"backend": "turboquant", ...}, whose other
        entries are arguments of `TurboQuantCache`."""
        options = dict(generation_config.cache_config or {})
        cache = model_kwargs.get("past_key_values")
        reads_memory = getattr(cache, "is_memory_cache", False) and not cache.local_is_given
        if (
            generation_config.cache_implementation != "quantized"
            or options.pop("backend", None) != "turboquant"
            or generation_config.use_cache is False
            or not (cache is None or reads_memory)
        ):
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not reads_memory:  # else what comes first is the memory's prefix
            options.setdefault("left_padding", model_kwargs.get("attention_mask"))
        quantized = TurboQuantCache(self.config, **options)
        if generation_config.is_assistant:
            quantized.activate_past_recording()
        model_kwargs["past_key_values"] = MemoryCache(cache.reader, quantized) if reads_memory else quantized

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if getattr(past_key_values, "is_memory_cache", False) and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + past_key_values.reader.position_offset
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        cache = model_kwargs.get("past_key_values")
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and getattr(cache, "is_memory_cache", False) and not cache.has_read:
            # Routing needs the whole question in every layer, so the model itself cuts the layers' work into
            # chunks.
            generation_config.prefill_chunk_size = None
            try:
                kwargs = {**model_kwargs, "prefill_chunk_size": chunk_size}
                return super()._prefill(input_ids, generation_config, kwargs, is_first_iteration)
            finally:
                generation_config.prefill_chunk_size = chunk_size
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _checked_memory(self, memory) -> MemoryBank:
        """The bank that is `memory`, or that a store has of what it may show; made by this model."""
        bank = memory.bank() if hasattr(memory, "bank") else memory
        if not hasattr(bank, "check_model"):
            raise ValueError(
                "memory must come from encode_memory, MemoryBank.from_pretrained or a MemoryStore; got "
                f"{type(memory).__name__}"
            )
        bank.check_model(self.config.memory_settings, self.fingerprint())
        return bank


def _tokenizer(tokenizer, memory: MemoryBank):
    tokenizer = tokenizer or memory.tokenizer
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given: this memory was loaded without one and its texts must be read"
        )
    return tokenizer
