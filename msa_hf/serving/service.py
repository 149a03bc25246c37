"""The model and the store of a server, what runs on them, and their orderly end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..store import MemoryStore, StoreError
from .errors import RequestError, queue_full
from .generation import Answered, Cancelled, Generation
from .limits import Limits
from .metrics import Metrics
from .protocol import ChatRequest
from .tokens import Access, Tokens
from .turns import Turns

logger = logging.getLogger(__name__)


class Service:
    """What requests share. Its coroutines belong to one event loop; nothing in them waits for the disk or
    the model.

    Args:
        store: open for writing, and closed by `close`. name: of the model, for clients. namespaces: those
            that are served; None is all.
    """

    def __init__(
        self,
        model,
        tokenizer,
        store: MemoryStore,
        tokens: Tokens,
        name: str,
        limits: Limits | None = None,
        namespaces: Sequence[str] | None = None,
    ):
        self.model, self.tokenizer, self.store, self.name = model, tokenizer, store, name
        self.limits, self.metrics = limits or Limits(), Metrics()
        self._tokens, self._namespaces = tokens, namespaces
        self.started, self.closing = int(time.time()), False
        self.turns = Turns(self.limits.concurrent, self.limits.waiting)
        self._generators = ThreadPoolExecutor(self.limits.concurrent, "msa-generate")
        self._writer = ThreadPoolExecutor(1, "msa-write")
        self._readers = ThreadPoolExecutor(4, "msa-read")
        self._writing = 0
        self._running: set[Generation] = set()
        self._documents = store.count()

    def access(self, header: str | None) -> Access:
        """The bearer of a token; see `Tokens.access`."""
        return self._tokens.access(header).within(self._namespaces)

    def generation(self, request: ChatRequest, access: Access, deadline: float) -> Generation:
        """What is to be generated. Raises RequestError for a namespace that the bearer may not read."""
        most = request.max_tokens
        if most is None:
            most = min(self.limits.answer_tokens, self.model.config.max_position_embeddings // 4)
        return Generation(request, access.to_read(request.namespaces), most, deadline)

    async def answer(self, generation: Generation, access: Access) -> Answered:
        """Waits for a turn, and generates.

        Cancelling the task ends the wait; a generation that runs is told to stop, and keeps its turn until
        its thread has come to an end.
        """
        await self.turns.take(access.name, max(0.0, generation.deadline - time.monotonic()))
        self._running.add(generation)
        try:
            work = asyncio.get_running_loop().run_in_executor(self._generators, self._generate, generation)
        except BaseException:
            self._ended(generation)
            raise
        work.add_done_callback(lambda _: self._ended(generation))
        try:
            answered = await asyncio.shield(work)
        except asyncio.CancelledError:
            generation.cancel()
            # Nobody takes what it raises any more.
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        self._note_use(answered)
        return answered

    def _generate(self, generation: Generation) -> Answered:
        """In a thread of its own."""
        outcome = "failed"
        try:
            answered = generation.answer(self.model, self.tokenizer, self.store)
            outcome = "finished"
            self.metrics.count("msa_tokens_total", answered.prompt_tokens, kind="prompt")
            self.metrics.count("msa_tokens_total", answered.completion_tokens, kind="completion")
            return answered
        except Cancelled:
            outcome = "cancelled"
            raise
        except RequestError as error:
            outcome = "timed_out" if error.status == 504 else "failed"
            raise
        finally:
            self.metrics.count("msa_generations_total", outcome=outcome)

    def _ended(self, generation: Generation) -> None:
        self._running.discard(generation)
        self.turns.give_back()

    def _note_use(self, answered: Answered) -> None:
        """Counts what was read as used, after the answer, for the store's budget."""
        used: dict[str, set[str]] = {}
        for source in answered.sources:
            used.setdefault(source.namespace, set()).add(source.id)

        def note() -> None:
            for namespace, ids in used.items():
                try:
                    self.store.record_use(sorted(ids), namespace)
                except StoreError as error:
                    logger.info("the use of %d documents was not counted: %s", len(ids), error)

        if used and not self.closing:
            self._writer.submit(note)

    async def read(self, work: Callable[..., Any], *args, **kwargs):
        """Runs what reads the store, in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: work(*args, **kwargs))

    async def write(self, work: Callable[..., Any], *args, **kwargs):
        """Runs what writes to the store, one after the other; durable when it returns."""
        self.turns.check_open()
        if self._writing > self.limits.waiting:
            raise queue_full()
        self._writing += 1

        def run():
            done = work(*args, **kwargs)
            self._documents = self.store.count()
            return done

        loop = asyncio.get_running_loop()
        written = loop.run_in_executor(self._writer, run)
        written.add_done_callback(self._wrote)
        return await asyncio.shield(written)

    def _wrote(self, written: asyncio.Future) -> None:
        self._writing -= 1
        if not written.cancelled():
            written.exception()  # taken, where the request has gone

    def rendered_metrics(self) -> str:
        return self.metrics.render(
            {
                "msa_running": lambda: self.turns.running,
                "msa_waiting": lambda: self.turns.waiting,
                "msa_documents": lambda: self._documents,
            }
        )

    def begin_closing(self) -> None:
        """Sends away who waits and who comes; what runs goes on."""
        self.closing = True
        self.turns.close()

    def close(self) -> None:
        """Stops what still runs, waits until it has, and closes the store. Blocks."""
        for generation in list(self._running):
            generation.cancel()
        for pool in (self._generators, self._readers, self._writer):
            pool.shutdown(wait=True)
        self.store.close()
