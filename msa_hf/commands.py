"""What the msa-hf commands do: load, call one library function, print. Heavy imports come late."""

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

from . import store_commands
from .arguments import batch_tokens, print_json
from .model_loading import load_model, model_path_of, warn_untrained
from .modeling.errors import MSAError
from .store_opening import is_store

logger = logging.getLogger(__name__)


def convert(options: argparse.Namespace) -> None:
    from .conversion import convert as convert_checkpoint
    from .modeling.configuration_msa import MSAConfig

    given = {
        "router_layers": options.router_layers,
        "chunk_size": options.chunk_size,
        "router_chunk_size": options.router_chunk_size,
        "top_k_documents": options.top_k,
        "score_normalization": _chosen_scores(options),
    }
    folder = convert_checkpoint(
        options.source,
        options.destination,
        routers=options.routers,
        dtype=options.dtype,
        revision=options.revision,
        max_shard_size=options.max_shard_size,
        **{name: value for name, value in given.items() if value is not None},
    )
    config = MSAConfig.from_pretrained(folder)
    result = {
        "model": str(folder),
        "backbone": config.backbone_type,
        "router_layers": list(config.router_layers),
        "chunk_size": config.chunk_size,
        "router_chunk_size": config.router_chunk_size,
        "routers_trained": bool(config.routers_trained),
    }
    if options.json:
        print_json(result)
        return
    layers = ", ".join(map(str, result["router_layers"])) or "none"
    trained = "trained" if result["routers_trained"] else "untrained: run msa-hf train-router"
    print(f"{folder}: {result['backbone']}, router layers {layers} ({trained})")


def _chosen_scores(options: argparse.Namespace) -> str | None:
    """The score normalisation given, or asked for where a checkpoint leaves it open and somebody is there."""
    if options.score_normalization or options.routers or not sys.stdin.isatty():
        return options.score_normalization
    from .conversion import open_score_normalization

    loss = open_score_normalization(options.source, options.revision)
    if loss is None:
        return None
    _say(
        f"{options.source} was trained with {loss}: documents were scored by cosine, but the reference\n"
        "implementation scores them with raw dot products when it infers. Which scores shall be used?\n"
        "  cosine  as it was trained (default)\n"
        "  dot     as the reference infers\n"
        "cosine or dot: "
    )
    while (answer := input().strip().lower() or "cosine") not in ("cosine", "dot"):
        _say("cosine or dot: ")
    return answer


def _say(text: str) -> None:
    """To whoever sits at the terminal; standard output is for results."""
    print(text, end="", file=sys.stderr, flush=True)


def export_reference(options: argparse.Namespace) -> None:
    from .conversion import export_reference as export

    folder = export(
        options.model,
        options.destination,
        aux_loss_method=options.aux_loss_method,
        max_shard_size=options.max_shard_size,
    )
    if options.json:
        print_json({"checkpoint": str(folder)})
        return
    print(f"{folder}: in the layout of the reference implementation")


def ingest(options: argparse.Namespace) -> None:
    from .ingestion import ingest as ingest_paths

    if options.store is not None:
        store_commands.ingest(options)
        return
    for name in ("namespace", "key_bits", "value_bits", "router_bits", "budget_bytes"):
        if getattr(options, name) is not None:
            raise MSAError(f"--{name.replace('_', '-')} needs --store")
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    done = ingest_paths(
        model,
        tokenizer,
        options.paths,
        options.out,
        model_path=os.path.abspath(options.model) if os.path.isdir(options.model) else options.model,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        resume=options.resume,
        progress=sys.stderr.isatty(),
        on_error=(lambda error: logger.warning("%s", error)) if options.keep_going else None,
    )
    stats = done.memory.stats()
    if options.json:
        print_json({"memory": str(options.out), "files": done.documents, **stats})
        return
    print(
        f"{options.out}: {done.documents:,} documents in {stats['documents']:,} pieces, "
        f"{stats['tokens']:,} tokens, {stats['vector_bytes_per_token']:,.0f} bytes per token"
    )
    warn_untrained(model)


def ask(options: argparse.Namespace) -> int:
    interactive = not options.questions and sys.stdin.isatty()
    questions = iter(options.questions) if options.questions else _questions(interactive)
    how = {name: getattr(options, name) for name in ("retrieval", "k", "rounds", "mode", "max_new_tokens")}
    asked = 0
    with _answering(options) as answer:
        for question in questions:
            reply = answer(question, **how)
            asked += 1
            print(json.dumps(reply.to_dict()) if options.json else render_reply(reply), flush=True)
    if not asked and not interactive:
        print("msa-hf ask: no question given", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _answering(options: argparse.Namespace) -> Iterator[Callable]:
    """The function that answers a question from the memory or store that the options name."""
    if is_store(options.memory):
        with store_commands.answering(options) as answer:
            yield answer
        return
    from .asking import ask as ask_memory
    from .modeling.memory_bank import MemoryBank

    for name in ("namespace", "at", "follow"):
        if getattr(options, name) is not None:
            raise MSAError(f"--{name} needs a store, and {options.memory} holds none")
    memory = MemoryBank.from_pretrained(options.memory)
    path = model_path_of(memory.metadata.get("model"), options.memory, options.model)
    model, tokenizer = load_model(path, options.device, options.dtype)
    memory.check_model(model.config.memory_settings, model.fingerprint())
    memory.to(model.device)
    yield partial(ask_memory, model, tokenizer, memory)


def train_router(options: argparse.Namespace) -> None:
    from .training import RouterTrainingConfig, hotpotqa_pairs, read_pairs
    from .training import train_router as train
    from .training.lora_training import LoraTrainingConfig, train_lora

    # --dtype is the model's precision, not that of the saved weights.
    names = {item.name for item in fields(RouterTrainingConfig)} - {"dtype"}
    given = {name: value for name, value in vars(options).items() if value is not None}
    config = RouterTrainingConfig(**{name: value for name, value in given.items() if name in names})
    if options.pairs == "hotpotqa":
        from .packages import hotpotqa

        pairs = hotpotqa_pairs(hotpotqa())
    else:
        pairs = read_pairs(options.pairs)
    pairs = pairs[: options.limit]
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    result = train(
        model,
        tokenizer,
        pairs,
        config,
        options.out,
        features_dir=options.features,
        progress=sys.stderr.isatty(),
        **batch_tokens(options),
    )
    if options.lora_rank:
        steps = {"steps": options.lora_steps} if options.lora_steps else {}
        lora = LoraTrainingConfig(rank=options.lora_rank, seed=config.seed, **steps)
        train_lora(model, tokenizer, pairs, lora, options.out, progress=sys.stderr.isatty())
    if options.json:
        print_json({"adapter": str(options.out), **_plain(result)})
        return
    figures = " ".join(f"{name} {value:.3f}" for name, value in result.consensus.items())
    print(
        f"{options.out}: consensus of the routers on held-out questions: {figures} ({result.seconds:.0f} s)"
    )


def render_reply(reply, width: int = 100, preview: int = 320) -> str:
    """An answer and its sources as text."""
    lines = [f"Q: {reply.question}", f"A: {reply.answer}", ""]
    lines += [f"  after: {question} {answer}" for question, answer in reply.earlier]
    for number, source in enumerate(reply.sources, 1):
        found = f"round {source.round}, rank {source.rank} (routers alone: {source.router_rank:,})"
        words = "" if source.lexical is None else f", BM25 {source.lexical:.2f}"
        place = f" · {source.source}" if source.source else ""
        place += f" ({source.namespace}: {source.id})" if source.namespace else ""
        lines.append(f"  [{number}] {source.title}{place}")
        lines.append(f"      {found}, score {source.score:.4f}, routers {source.router_score:.2f}{words}")
        body = source.text.removeprefix(source.title).split()
        text = textwrap.shorten(" ".join(body), preview, placeholder=" …")
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    lines.append(f"  {len(reply.sources)} passages, {reply.seconds:.2f} s, retrieval: {reply.retrieval}")
    return "\n".join(lines)


def _questions(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("\nquestion (empty line to leave): ") if interactive else input()
        except EOFError:
            return
        if line.strip():
            yield line
        elif interactive:
            return


def _plain(result) -> dict:
    return {item.name: getattr(result, item.name) for item in fields(result)}
