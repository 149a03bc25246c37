"""What `eval` and `calibrate-cache` do: load, call one library function, print. Heavy imports come late."""

import argparse
import json
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from .arguments import batch_tokens, print_json
from .model_loading import load_model, warn_untrained
from .modeling.errors import MSAError
from .modeling.memory_files import replace_json

logger = logging.getLogger(__name__)


def evaluate(options: argparse.Namespace) -> None:
    if options.out and not Path(options.out).parent.is_dir():  # told before hours of work
        raise MSAError(f"--out must be a file in a folder that exists; got {options.out}")
    own = {"cache": _evaluate_cache, "compare": _compare_caches, "needle": _evaluate_needle}
    if options.suite in own:
        own[options.suite](options)
        return
    from .evaluation import answers, cost, retrieval, store_costs
    from .evaluation.cached_memory import benchmark_memory
    from .evaluation.hotpotqa import load_hotpotqa

    model, tokenizer = load_model(options.model, options.device, options.dtype)
    warn_untrained(model)
    benchmark = load_hotpotqa(options.memory_questions)
    batch = batch_tokens(options)
    shared = {"cache_dir": options.cache, "progress": sys.stderr.isatty(), **batch}
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
    _report(report.to_dict(), suite.render(report), options)


def _evaluate_cache(options: argparse.Namespace) -> None:
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
    reports = measure(
        options.model,
        cache_systems(names, **({} if options.window is None else {"window": options.window})),
        task,
        peers=all_peers() if options.peers else (),
        dtype="float32" if options.dtype == "auto" else options.dtype,
        device=options.device,
    )
    for report in reports:  # kept as they come: a run takes hours
        _write(report.to_dict(), options)
    if options.plot:
        cache_evaluation.save_plot(report, options.plot)
    _show(report.to_dict(), cache_evaluation.render(report), options)


def _compare_caches(options: argparse.Namespace) -> None:
    from .documents import read_documents, split_document
    from .evaluation import cache_comparison
    from .store_ingestion import token_counter

    if not options.documents or not options.ask:
        raise MSAError("compare needs --documents PATH and --ask TEXT")
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    read, count = read_documents(options.documents), token_counter(tokenizer)
    pieces = [piece.content for document in read for piece in split_document(document, 256, count)]
    memory = model.encode_memory(pieces, tokenizer, progress=sys.stderr.isatty(), **batch_tokens(options))
    names = options.systems or cache_comparison.SYSTEMS
    answers = list(cache_comparison.compare_caches(model, tokenizer, options.ask, memory, names))
    _report({"answers": [own.to_dict() for own in answers]}, cache_comparison.render(answers), options)


def _evaluate_needle(options: argparse.Namespace) -> None:
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
    _write(result, options)
    _show(result, text, options)


def _write(result: dict, options: argparse.Namespace) -> None:
    if options.out:
        replace_json(Path(options.out), result, str(os.getpid()))


def _show(result: dict, text: str, options: argparse.Namespace) -> None:
    print(json.dumps(result) if options.json else text)


def calibrate_cache(options: argparse.Namespace) -> None:
    from .evaluation.cache_models import load_causal_model, model_folder
    from .evaluation.cache_texts import calibration_texts, question_texts
    from .modeling.cache_turboquant import TurboQuantCache
    from .modeling.calibration_plan import CalibrationPlan

    if options.texts:
        texts = [Path(path).read_text(encoding="utf-8") for path in options.texts]
    else:
        texts = calibration_texts()
    if options.questions:
        texts += question_texts()
    model, tokenizer = load_causal_model(model_folder(options.model), options.dtype, options.device)
    calibration = TurboQuantCache.calibrate(
        model,
        texts,
        options.average_bits,
        tokenizer=tokenizer,
        transforms=not options.no_transforms,
        segments=max(CalibrationPlan.segments, len(texts)),
        seed=options.seed,
    )
    calibration.save_pretrained(options.out)
    if options.json:
        print_json({"calibration": str(options.out), **calibration.details})
        return
    found = calibration.details
    print(
        f"{options.out}: {found['bits']:.3f} bits (keys {found['key_bits']:.3f}, values "
        f"{found['value_bits']:.3f}), KL {found['measured_kl']:.5f} on texts that it was not fitted to"
    )
