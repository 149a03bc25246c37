"""The Transformers pipeline "memory-question-answering": questions to a memory, answers with their sources.

pipeline("memory-question-answering", model="./smol-msa", memory="./store")(question="Which court?")
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from .asking import Reply, ask_together
from .modeling.memory_bank import MemoryBank
from .store import MemoryStore
from .store_opening import is_store

TASK = "memory-question-answering"
SHOWN = ("id", "namespace", "title", "text", "score", "router_rank", "round")  # of a source
_OWN = ("question", "namespaces", "where")  # of a question that is given as a dict


@dataclass(frozen=True)
class _Reading:
    """What one question reads."""

    memory: Any
    namespaces: Any
    where: Any

    @property
    def key(self) -> tuple:
        return id(self.memory), repr(self.namespaces), repr(self.where)


class MemoryQuestionAnsweringPipeline(Pipeline):
    """Answers questions from a memory.

    Args:
        memory: a `MemoryBank`, a `MemoryStore`, or the folder of either. A folder's store is opened to read
            only, and read at its newest commit in every call. May be given with a call instead.
        namespaces, where: what is read of a store, see `MemoryStore.bank`.
        k, rounds, mode, retrieval: see `asking.ask`.
        others: for `generate`, as max_new_tokens, do_sample, streamer (one question at a time).

    A call takes `question=`: a text, a dict {"question", "namespaces", "where"}, or a list of these. It gives
    {"answer", "sources", "scores", "retrieval"}, or a list of them; "sources" holds passages as they were
    found, "scores" their scores in the same order. `batch_size=` questions are answered at once.
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _pipeline_calls_generate = False  # ours goes through `asking`, which knows the memory

    def __init__(self, *args, **kwargs):
        self._opened: dict[str, MemoryBank | MemoryStore] = {}
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "encode_memory"):
            raise ValueError(
                f"model must have a memory, and {type(self.model).__name__} has none: "
                "make one with msa-hf convert"
            )
        if self.tokenizer is None:
            raise ValueError("tokenizer must be given with a model that is already loaded")

    def __call__(self, question=None, **options):
        several = isinstance(question, (list, tuple))
        for one in question if several else [question]:
            _check(one)
        if several:
            if options.get("streamer", self._forward_params.get("streamer")) is not None:
                raise ValueError("streamer takes one question at a time; got a list of them")
            if not question:
                return []
            question = list(question)
        for store in self._opened.values():
            if isinstance(store, MemoryStore):
                store.refresh()
        return super().__call__(question, **options)

    def close(self) -> None:
        """Closes the stores that this pipeline has opened itself."""
        for memory in self._opened.values():
            if isinstance(memory, MemoryStore):
                memory.close()
        self._opened.clear()

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves model and tokenizer. The pipeline itself comes with `import msa_hf`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    def _sanitize_parameters(self, memory=None, namespaces=None, where=None, **forward):
        given = {"memory": memory, "namespaces": namespaces, "where": where}
        return {name: value for name, value in given.items() if value is not None}, forward, {}

    def preprocess(self, inputs, memory=None, namespaces=None, where=None) -> dict[str, Any]:
        own = {"question": inputs} if isinstance(inputs, str) else dict(inputs)
        reading = _Reading(self._memory(memory), own.get("namespaces", namespaces), own.get("where", where))
        return {"question": own["question"], "reading": reading}

    def _forward(self, model_inputs: dict[str, Any], **options) -> dict[str, Any]:
        if isinstance(model_inputs["question"], str):
            return {"reply": self._answers([model_inputs["question"]], model_inputs["reading"], options)[0]}
        questions, readings = model_inputs["question"], model_inputs["reading"]
        replies: dict[int, Reply] = {}
        for reading in {one.key: one for one in readings}.values():
            rows = [row for row, one in enumerate(readings) if one.key == reading.key]
            answered = self._answers([questions[row] for row in rows], reading, options)
            replies |= dict(zip(rows, answered))
        return {"reply": [replies[row] for row in range(len(questions))]}

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        reply: Reply = model_outputs["reply"]
        return {
            "answer": reply.answer,
            "sources": [{name: getattr(source, name) for name in SHOWN} for source in reply.sources],
            "scores": [source.score for source in reply.sources],
            "retrieval": reply.retrieval,
        }

    def _answers(self, questions: list[str], reading: _Reading, options: dict[str, Any]) -> list[Reply]:
        bank = _bank(reading).to(self.model.device)
        return ask_together(self.model, self.tokenizer, bank, questions, **options)

    def _memory(self, memory) -> MemoryBank | MemoryStore:
        if memory is None:
            raise ValueError("memory must be given: a MemoryBank, a MemoryStore, or the folder of one")
        if not isinstance(memory, (str, Path)):
            if not (hasattr(memory, "check_model") or hasattr(memory, "bank")):
                raise ValueError(
                    f"memory must be a MemoryBank, a MemoryStore, or a folder; got {type(memory).__name__}"
                )
            return memory
        key = str(Path(memory).resolve())
        if key not in self._opened:
            if is_store(memory):
                self._opened[key] = MemoryStore.open(memory, self.model, self.tokenizer, read_only=True)
            else:
                self._opened[key] = MemoryBank.from_pretrained(memory)
        return self._opened[key]


def _bank(reading: _Reading) -> MemoryBank:
    given = {"namespaces": reading.namespaces, "where": reading.where}
    given = {name: value for name, value in given.items() if value is not None}
    if hasattr(reading.memory, "check_model"):
        if given:
            raise ValueError(f"{' and '.join(given)} need a MemoryStore; this memory is a MemoryBank")
        return reading.memory
    return reading.memory.bank(**given)


def _check(question: object) -> None:
    """Raises ValueError for anything that is no question."""
    text = question
    if isinstance(question, Mapping):
        strange = sorted(set(map(str, question)) - set(_OWN))
        if strange or "question" not in question:
            raise ValueError(
                f"a question as a dict must have the keys {', '.join(_OWN)}; got {sorted(question)}"
            )
        text = question["question"]
    if not isinstance(text, str):
        raise ValueError(f"question must be a text, a dict with one, or a list of them; got {text!r}")
    if not text.strip():
        raise ValueError("question must not be empty")


def register() -> None:
    """Makes the task known to `transformers.pipeline`."""
    if TASK not in PIPELINE_REGISTRY.supported_tasks:  # a second registration would warn
        PIPELINE_REGISTRY.register_pipeline(
            TASK, MemoryQuestionAnsweringPipeline, pt_model=AutoModelForCausalLM, type="text"
        )
