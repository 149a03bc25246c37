"""What the msa-hf commands do: load, call one library function, print. Heavy imports come late."""

import argparse
import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from . import store_commands
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
        _print_json(result)
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
        _print_json({"checkpoint": str(folder)})
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
        progress=_shows_progress(),
        on_error=(lambda error: logger.warning("%s", error)) if options.keep_going else None,
    )
    stats = done.memory.stats()
    if options.json:
        _print_json({"memory": str(options.out), "files": done.documents, **stats})
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
        progress=_shows_progress(),
        **_batch_tokens(options),
    )
    if options.lora_rank:
        steps = {"steps": options.lora_steps} if options.lora_steps else {}
        lora = LoraTrainingConfig(rank=options.lora_rank, seed=config.seed, **steps)
        train_lora(model, tokenizer, pairs, lora, options.out, progress=_shows_progress())
    if options.json:
        _print_json({"adapter": str(options.out), **_plain(result)})
        return
    figures = " ".join(f"{name} {value:.3f}" for name, value in result.consensus.items())
    print(
        f"{options.out}: consensus of the routers on held-out questions: {figures} ({result.seconds:.0f} s)"
    )


def calibrate_cache(options: argparse.Namespace) -> None:
    from .evaluation.cache_models import load_causal_model, model_folder
    from .evaluation.cache_texts import calibration_texts
    from .modeling.cache_turboquant import TurboQuantCache

    if options.texts:
        texts = [Path(path).read_text(encoding="utf-8") for path in options.texts]
    else:
        texts = calibration_texts()
    model, tokenizer = load_causal_model(model_folder(options.model), options.dtype, options.device)
    calibration = TurboQuantCache.calibrate(
        model,
        texts,
        options.average_bits,
        tokenizer=tokenizer,
        transforms=not options.no_transforms,
        seed=options.seed,
    )
    calibration.save_pretrained(options.out)
    if options.json:
        _print_json({"calibration": str(options.out), **calibration.details})
        return
    found = calibration.details
    print(
        f"{options.out}: {found['bits']:.3f} bits (keys {found['key_bits']:.3f}, values "
        f"{found['value_bits']:.3f}), KL {found['measured_kl']:.5f} on texts that it was not fitted to"
    )


def evaluate(options: argparse.Namespace) -> None:
    own = {"cache": evaluate_cache, "compare": compare_caches, "needle": evaluate_needle}
    if options.suite in own:
        own[options.suite](options)
        return
    from .evaluation import answers, cost, retrieval, store_costs
    from .evaluation.cached_memory import benchmark_memory
    from .evaluation.hotpotqa import load_hotpotqa

    model, tokenizer = load_model(options.model, options.device, options.dtype)
    warn_untrained(model)
    benchmark = load_hotpotqa(options.memory_questions)
    batch = _batch_tokens(options)
    shared = {"cache_dir": options.cache, "progress": _shows_progress(), **batch}
    if options.suite == "retrieval":
        suite = retrieval
        benchmark = benchmark.first(options.questions)
        report = retrieval.evaluate_retrieval(
            model, tokenizer, benchmark, with_encoder=not options.no_encoder, **shared
        )
        if options.plot:
            retrieval.save_plot(report, options.plot)
    elif options.suite == "answers":
        suite = answers
        questions = options.questions or 200
        report = answers.evaluate_answers(model, tokenizer, benchmark, questions=questions, **shared)
    elif options.suite == "store":
        suite = store_costs
        report = store_costs.evaluate_store(
            model,
            tokenizer,
            benchmark.first(options.questions),
            benchmark_memory(model, tokenizer, benchmark.documents, **shared),
            options.model,
            large_documents=options.store_documents,
            progress=lambda message: logger.info("%s", message),
        )
    else:
        suite = cost
        memory = benchmark_memory(model, tokenizer, benchmark.documents, **shared)
        documents = benchmark.documents
        report = cost.evaluate_cost(model, tokenizer, documents, memory, checkpoint=options.model, **batch)
    if options.out:
        suite.save_json(report, options.out)
    print(json.dumps(report.to_dict()) if options.json else suite.render(report))


def evaluate_cache(options: argparse.Namespace) -> None:
    from .evaluation import cache_evaluation
    from .evaluation.cache_benchmark import CacheTask, all_peers
    from .evaluation.cache_benchmark import evaluate_cache as measure
    from .evaluation.cache_systems import cache_systems

    names = list(options.systems or ([] if options.key_bits else ["4bit", "3bit", "k2v2"]))
    if options.key_bits:
        names.append(f"k{options.key_bits}v{options.value_bits or options.key_bits}")
    elif options.value_bits:
        raise MSAError("--value-bits needs --key-bits")
    given = {
        "parts": options.parts,
        "texts": options.texts,
        "long_texts": options.texts,
        "questions": options.questions,
        "skip_questions": options.skip_questions,
        "contexts": options.contexts,
        "needle_lengths": options.lengths,
    }
    task = CacheTask(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )
    if options.plot and "quality" not in task.parts:
        raise MSAError("--plot shows KL over bits: it needs the part quality")
    report = measure(
        options.model,
        cache_systems(names, **({} if options.window is None else {"window": options.window})),
        task,
        peers=all_peers() if options.peers else (),
        dtype="float32" if options.dtype == "auto" else options.dtype,
        device=options.device,
    )
    if options.plot:
        cache_evaluation.save_plot(report, options.plot)
    if options.out:
        cache_evaluation.save_json(report, options.out)
    print(json.dumps(report.to_dict()) if options.json else cache_evaluation.render(report))


def compare_caches(options: argparse.Namespace) -> None:
    from .documents import read_documents, split_document
    from .evaluation import cache_comparison
    from .store_ingestion import token_counter

    if not options.documents or not options.ask:
        raise MSAError("compare needs --documents PATH and --ask TEXT")
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    read, count = read_documents(options.documents), token_counter(tokenizer)
    pieces = [piece.content for document in read for piece in split_document(document, 256, count)]
    memory = model.encode_memory(pieces, tokenizer, progress=_shows_progress(), **_batch_tokens(options))
    names = options.systems or cache_comparison.SYSTEMS
    answers = list(cache_comparison.compare_caches(model, tokenizer, options.ask, memory, names))
    _report({"answers": [own.to_dict() for own in answers]}, cache_comparison.render(answers), options)


def evaluate_needle(options: argparse.Namespace) -> None:
    from .documents import read_documents
    from .evaluation import memory_needle, needle_map

    if options.plot and find_spec("matplotlib") is None:  # told before an hour of work
        raise MSAError("--plot needs matplotlib: pip install matplotlib")
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    events = memory_needle.needle_grid(
        model,
        tokenizer,
        read_documents(options.documents) if options.documents else None,
        options.lengths or memory_needle.LENGTHS,
        options.depths or memory_needle.DEPTHS,
        seed=options.seed,
    )
    warn_untrained(model)
    cells = []
    for event in events:
        logger.info("%s", event)
        if isinstance(event, memory_needle.NeedleCell):
            cells.append(event)
    if options.plot:
        needle_map.save_plot(cells, options.plot)
    _report(needle_map.to_dict(cells), needle_map.render(cells), options)


def _report(result: dict, text: str, options: argparse.Namespace) -> None:
    """Prints a result as JSON or as text, and writes it where --out says."""
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.json else text)


def load_model(path: str, device: str | None = None, dtype: str = "auto"):
    """(model, tokenizer) of a converted model, ready to answer. Raises MSAError if it is not one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not Path(path).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise MSAError(f"{path} is no folder of a model: make one with msa-hf convert")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not hasattr(config, "router_layers"):
        raise MSAError(f"{path} is a {config.model_type} model without memory: run msa-hf convert first")
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _batch_tokens(options: argparse.Namespace) -> dict[str, int]:
    return {"batch_tokens": options.batch_tokens} if options.batch_tokens else {}


def warn_untrained(model) -> None:
    if not model.config.routers_trained:
        logger.warning(
            "the routers of this model are untrained, so routing alone picks documents by chance: "
            "train them with msa-hf train-router"
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


def model_path_of(known: object, memory: str | Path, given: str | None) -> str:
    """The model to load: the given one, or the one that a memory or store remembers."""
    if given:
        return given
    if not isinstance(known, str):
        raise MSAError(f"{memory} does not say which model made it: name it with --model")
    # A memory may come from someone else; what it names is used only if it is already here.
    if not Path(known).is_dir():
        raise MSAError(f"{memory} was made by {known}, which is no folder here: use --model")
    return known


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


def _shows_progress() -> bool:
    return sys.stderr.isatty()


def _print_json(value: dict) -> None:
    print(json.dumps(value))
