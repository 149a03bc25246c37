"""The one model of the process: encodes passages and answers questions, in turns."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msa_hf.modeling.errors import MSAError
from msa_hf.serving.errors import RequestError
from msa_hf.serving.generation import Answered, Cancelled, Generation
from msa_hf.serving.protocol import ChatRequest
from msa_hf.store import MemoryStore
from msa_hf.store.provenance import coding_of, provenance_of

from .gpu import lends, on_gpu
from .limits import Limits
from .refusals import Refused
from .turns import Turns

CPU_PORTION, GPU_PORTION = 4096, 65536  # tokens of one turn of encoding
POLL = 0.05  # seconds between looks at whether an answer is still wanted
# What can be chosen on the page: (retrieval, what ranks documents), by the words that say it.
BOTH, ROUTERS, WORDS = "Routers and words", "Routers alone", "Words alone (BM25)"
ATTENTION, GENERATIVE = "Attention to the memory", "The model names documents"
WAYS = {
    BOTH: ("router", "fused"),
    ROUTERS: ("router", "router"),
    WORDS: ("router", "lexical"),
    ATTENTION: ("attention", None),
    GENERATIVE: ("generative", None),
}


class Engine:
    """A model with its tokenizer, and whose turn it is.

    Args:
        name: of the model, for people. portion_tokens: that are encoded in one turn.
    """

    def __init__(self, model, tokenizer, name: str, limits: Limits, portion_tokens: int | None = None):
        self.model, self.tokenizer, self.name, self.limits = model, tokenizer, name, limits
        self.has_gpu = model.device.type == "cuda" or lends()
        self.portion_tokens = portion_tokens or (GPU_PORTION if self.has_gpu else CPU_PORTION)
        self.turns = Turns(limits.waiting)
        # What every store of this model shares; the first call measures it, and no visitor waits for that.
        coding_of(provenance_of(model, tokenizer, 4, 4, 4), model, tokenizer)
        self._add, self._answer = on_gpu(self._add_now, model), on_gpu(self._answer_now, model)

    @property
    def ways(self) -> list[str]:
        """What this checkpoint can do, the way that suits it best first."""
        config = self.model.config
        if config.retrieval == "router":
            return [BOTH, WORDS, ROUTERS] if config.routers_trained else [WORDS]
        ways = [ATTENTION, *([GENERATIVE] if config.prompt_format == "msa" else [])]
        return ways if config.retrieval == "attention" else ways[::-1]

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def add(
        self,
        folder: Path,
        texts: Sequence[str],
        ids: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        visitor: str,
    ) -> int:
        """Adds texts to the store in `folder`, or replaces them, in one turn; the number of its commits."""
        with self.turns.of(visitor):
            return self._add(folder, list(texts), list(ids), list(metadata))

    def answer(
        self, folder: Path, request: ChatRequest, stop: Path, visitor: str
    ) -> Iterator[str | Answered]:
        """Pieces of an answer from the store in `folder`, and at the end all of it, in one turn.

        Ends early, without an `Answered`, once there is a file `stop`. Raises Refused for a question that
        cannot be answered.
        """
        with self.turns.of(visitor):
            yield from self._answer(folder, request, stop)

    def _add_now(self, folder: Path, texts: list[str], ids: list[str], metadata: list[dict]) -> int:
        with MemoryStore.open(folder, self.model, self.tokenizer) as store:
            before = store.version
            store.add(texts, ids, metadata=metadata, if_exists="update")
            return store.version - before

    def _answer_now(self, folder: Path, request: ChatRequest, stop: Path) -> Iterator[str | Answered]:
        found: queue.SimpleQueue[str | Answered | BaseException] = queue.SimpleQueue()
        most = min(self.limits.answer_tokens, self.model.config.max_position_embeddings // 4)
        deadline = time.monotonic() + self.limits.answer_seconds
        generation = Generation(request, "default", most, deadline, found.put)
        worker = threading.Thread(target=self._generate, args=(generation, folder, found), name="msa-answer")
        worker.start()
        try:
            while True:
                try:
                    item = found.get(timeout=POLL)
                except queue.Empty:
                    if stop.exists():
                        generation.cancel()
                    continue
                if isinstance(item, BaseException):
                    _raise(item)
                    return
                yield item
                if isinstance(item, Answered):
                    return
        finally:
            # Also where nobody listens any more: the model is free when the thread has ended.
            generation.cancel()
            worker.join()

    def _generate(self, generation: Generation, folder: Path, found: queue.SimpleQueue) -> None:
        try:
            with MemoryStore.open(folder, self.model, self.tokenizer, read_only=True) as store:
                found.put(generation.answer(self.model, self.tokenizer, store))
        except BaseException as error:  # raised again where the answer is waited for
            found.put(error)


def _raise(error: BaseException) -> None:
    """What ends an answer, in words for the person who asked; nothing for one that was stopped."""
    if isinstance(error, Cancelled):
        return
    if isinstance(error, RequestError):
        raise Refused(_sentence(str(error))) from error
    if isinstance(error, (MSAError, ValueError)):
        raise Refused(_sentence(f"this question cannot be answered: {error}")) from error
    raise error


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
