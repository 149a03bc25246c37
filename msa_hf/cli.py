"""The msa-hf command: convert, export-reference, ingest, ask, train-router, calibrate-cache, eval and more.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 an error with one
line that says what to do, 2 wrong usage, 130 interrupted.
"""

import argparse
import logging
import os
import sys

from . import __version__, commands
from .arguments import (
    DTYPES,
    add_batch_tokens,
    add_loading,
    add_store_settings,
    byte_count,
    command,
    examples,
    integers,
    names,
    positive,
)
from .modeling.errors import MSAError
from .push_cli import add_push
from .serve_cli import add_serve
from .space_cli import add_space
from .store_cli import add_reading, add_store_commands

_SUITES = {
    "retrieval": "recall of routers, BM25, both fused, and a sentence encoder",
    "answers": "exact match and F1: closed book, from memory, with the gold paragraphs given",
    "cost": "encoding speed, time to first token, peak memory, bytes per token",
    "store": "bytes, recall, editing, opening and searching of a MemoryStore",
    "cache": "quantised key/value caches: KL, length, needles, MMLU, speed, bytes; any causal model",
    "compare": "one question about some documents, answered with each cache side by side",
    "needle": "facts hidden in a memory of real texts: found or lost over depth and length",
}
_CACHE_PARTS = "quality, bytes, length, needle, mmlu, speed"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = build_parser().parse_args(arguments)
    handler = _log_to_stderr(logging.INFO if options.verbose else logging.WARNING)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MSAError, OSError, ValueError) as error:
        if options.debug:
            raise
        print(f"msa-hf: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    finally:
        logging.getLogger("msa_hf").removeHandler(handler)


def _log_to_stderr(level: int) -> logging.Handler:
    """Our own messages, one line each; other libraries keep their handlers, so that none shows twice."""
    from transformers.utils.logging import disable_progress_bar

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("msa_hf").addHandler(handler)
    logging.getLogger("msa_hf").setLevel(level)
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()
    return handler


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each leaves the function to call in `run`."""
    parser = argparse.ArgumentParser(
        prog="msa-hf",
        description="Give a language model a memory of documents and ask it questions.",
        epilog=examples(
            "msa-hf convert HuggingFaceTB/SmolLM2-135M-Instruct ./smol-msa",
            "msa-hf ingest ./smol-msa ./docs --out ./library",
            'msa-hf ask ./library "Which court heard the case?"',
            "msa-hf ingest ./smol-msa ./docs --store ./store       # a memory that can be edited",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"msa-hf {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_convert,
        _add_export_reference,
        _add_ingest,
        _add_ask,
        _add_train_router,
        _add_calibrate_cache,
        _add_eval,
    ):
        add(subparsers)
    add_store_commands(subparsers)
    add_push(subparsers)
    add_serve(subparsers)
    add_space(subparsers)
    return parser


def _add_convert(subparsers) -> None:
    parser = command(
        subparsers,
        "convert",
        "make an MSA checkpoint from a Llama, Mistral, Qwen2 or Qwen3 model",
        "The weights keep their values; routers are added, untrained unless --routers names an adapter.\n"
        "Checkpoints of the reference implementation (EverMind-AI/MSA-4B) keep the routers that they have;\n"
        "if how they score documents is open, you are asked, or --score-normalization says it.\n"
        "Weights in safetensors go from file to file: the memory that this takes does not grow with the\n"
        "model. The disk holds both, a Hub id's source in the cache of huggingface_hub.",
        "msa-hf convert smollm2-135m ./smol-msa                      # a preset; needs no Hub",
        "msa-hf convert HuggingFaceTB/SmolLM2-135M-Instruct ./smol-msa --routers smollm2-135m",
        "msa-hf convert ./model.gguf ./msa --router-layers 8,16,24 --router-chunk-size 16",
        "msa-hf convert ./backbone ./msa --routers ./routers",
        "msa-hf convert EverMind-AI/MSA-4B ./msa-4b --score-normalization cosine --max-shard-size 5GB",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, GGUF file, Hub id or preset")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make")
    parser.add_argument(
        "--routers", metavar="ADAPTER", help="router adapter to merge: a folder, one shipped, or none"
    )
    parser.add_argument("--router-layers", type=integers, metavar="N,N", help="layers that route")
    for name, what in (
        ("chunk-size", "tokens of a chunk of keys and values"),
        ("router-chunk-size", "tokens of a chunk of router keys"),
        ("top-k", "documents selected per layer"),
    ):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=what)
    parser.add_argument(
        "--score-normalization",
        choices=["cosine", "key", "dot"],
        help="what is normalised before routers score documents: queries and keys, keys, neither "
        "(default cosine)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights written (default: as the source's)"
    )
    _add_shard_size(parser)
    parser.add_argument("--revision", help="commit, tag or branch of a Hub id")
    parser.set_defaults(run=commands.convert)


def _add_export_reference(subparsers) -> None:
    parser = command(
        subparsers,
        "export-reference",
        "write a model in the layout of the reference implementation",
        'For the code of EverMind-AI/MSA: config.json with model_type "msa" and msa_config, and the weights\n'
        "with their names there. What that layout cannot hold is refused before anything is written.",
        "msa-hf export-reference ./msa-4b ./for-the-reference",
        "msa-hf export-reference ./msa ./for-the-reference --aux-loss-method INFONCE",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a converted model on Qwen3")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make")
    parser.add_argument(
        "--aux-loss-method",
        metavar="NAME",
        help="in place of the model's; the reference infers with cosine scores if it is INFONCE, else with "
        "raw dot products",
    )
    _add_shard_size(parser)
    parser.set_defaults(run=commands.export_reference)


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        default="50GB",
        metavar="SIZE",
        help="of a file of weights, as 5GB or 500MB (default 50GB)",
    )


def _add_ingest(subparsers) -> None:
    parser = command(
        subparsers,
        "ingest",
        "encode files and folders into a memory or a store",
        "Reads .txt .md .html .pdf .jsonl and source code; long documents are split at natural boundaries.\n"
        "--out makes a memory anew. --store adds to a store, which can be edited: what is there already\n"
        "costs nothing, what has changed is updated, and after an interruption the same command goes on.",
        "msa-hf ingest ./smol-msa ./docs report.pdf --out ./library",
        "msa-hf ingest ./smol-msa ./docs --out ./library --resume     # go on after an interruption",
        "msa-hf ingest ./smol-msa ./docs --store ./store --namespace manuals --budget-bytes 500MB",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a converted model")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files and folders")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", metavar="MEMORY", help="folder to make, or memory to replace")
    place.add_argument("--store", metavar="STORE", help="store to add to; made if it is not there")
    parser.add_argument("--namespace", metavar="NAME", help='of the store, default "default"')
    parser.add_argument(
        "--max-tokens", type=positive, default=256, metavar="N", help="per piece, default 256"
    )
    add_batch_tokens(parser)
    parser.add_argument("--resume", action="store_true", help="use what an interrupted --out has encoded")
    parser.add_argument("--keep-going", action="store_true", help="warn about unreadable files and go on")
    add_store_settings(parser)
    add_loading(parser)
    parser.set_defaults(run=commands.ingest)


def _add_ask(subparsers) -> None:
    parser = command(
        subparsers,
        "ask",
        "ask a memory or a store questions",
        "Prints the answer and the passages that it was given from. Without a question, asks for\n"
        "questions in a terminal, or reads one per line from standard input. With --follow, questions\n"
        "and answers are remembered in the store under that name: later ones may refer to them.",
        'msa-hf ask ./library "Which court heard the case?"',
        'msa-hf ask ./library "Who wrote it?" --k 6 --rounds 3 --json',
        "msa-hf ask ./library < questions.txt",
        'msa-hf ask ./store "Who wrote the first program?" "And where was she born?" --follow ada',
    )
    parser.add_argument("memory", metavar="MEMORY", help="folder made by ingest, with --out or --store")
    parser.add_argument("questions", metavar="QUESTION", nargs="*", help="in quotes")
    parser.add_argument("--model", help="folder of the model; default: the one that made the memory")
    parser.add_argument("--retrieval", choices=["auto", "attention", "router", "generative"], default="auto")
    parser.add_argument(
        "--mode",
        choices=["fused", "router", "lexical"],
        help="what ranks documents: routers and BM25, routers alone, BM25 alone (default: as the model says)",
    )
    parser.add_argument("--k", type=positive, metavar="N", help="documents to read at most")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds of retrieval at most")
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="default 32")
    parser.add_argument(
        "--follow", metavar="NAME", help="of a store: a conversation to begin or to go on with"
    )
    add_reading(parser)
    add_loading(parser)
    parser.set_defaults(run=commands.ask)


def _add_train_router(subparsers) -> None:
    parser = command(
        subparsers,
        "train-router",
        "train the routers of a converted model",
        'PAIRS is a file of JSON lines {"question": text, "positives": [text], "negatives": [text]},\n'
        'or "hotpotqa" for the HotpotQA questions outside the benchmark. The backbone stays as it is\n'
        "unless --lora-rank is given.",
        "msa-hf train-router ./smol-msa pairs.jsonl --out ./routers",
        "msa-hf train-router ./smol-msa hotpotqa --out ./routers --steps 1000 --seed 1",
        "msa-hf train-router ./smol-msa pairs.jsonl --out ./adapter --lora-rank 8",
        "msa-hf convert ./backbone ./trained --routers ./routers      # then put them in",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a converted model")
    parser.add_argument("pairs", metavar="PAIRS", help='JSON lines, or "hotpotqa"')
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the adapter and its log")
    parser.add_argument("--features", metavar="FOLDER", help="keeps the backbone's states for later runs")
    parser.add_argument("--limit", type=positive, metavar="N", help="use the first N pairs only")
    for name, kind, what in (
        ("steps", positive, "optimiser steps per layer"),
        ("batch-size", positive, "questions per step"),
        ("learning-rate", float, "peak learning rate"),
        ("temperature", float, "of the contrastive loss"),
        ("hard-negatives", int, "per question and step"),
        ("held-out", positive, "questions kept for evaluation"),
        ("eval-every", positive, "steps between evaluations"),
        ("patience", positive, "evaluations without progress before stopping"),
        ("seed", int, "of everything random"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=what)
    parser.add_argument("--lora-rank", type=positive, metavar="N", help="then train LoRA on attention, too")
    parser.add_argument("--lora-steps", type=positive, metavar="N", help="optimiser steps of that")
    add_batch_tokens(parser)
    add_loading(parser)
    parser.set_defaults(run=commands.train_router)


def _add_calibrate_cache(subparsers) -> None:
    parser = command(
        subparsers,
        "calibrate-cache",
        "find where a quantised key/value cache of a model needs its bits",
        "Gradients of texts and measured KL decide the bits of every layer and head, and fit transforms.\n"
        "TurboQuantCache takes the folder through Calibration.from_pretrained.",
        "msa-hf calibrate-cache smollm2-135m --average-bits 2.7 --out ./smollm2-2.7bit",
        "msa-hf calibrate-cache ./model --average-bits 1.8 --texts notes.txt code.py --out ./model-1.8bit",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of any causal model, or a packaged one")
    parser.add_argument(
        "--average-bits",
        type=float,
        default=2.7,
        metavar="B",
        help="per key and value, scales and means included; default 2.7",
    )
    parser.add_argument(
        "--texts", nargs="+", metavar="FILE", help="what it is fitted to (default: articles, code and recall)"
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the calibration")
    parser.add_argument("--no-transforms", action="store_true", help="bits alone: one small JSON file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")
    add_loading(parser)
    parser.set_defaults(run=commands.calibrate_cache)


def _add_eval(subparsers) -> None:
    parser = command(
        subparsers,
        "eval",
        "measure retrieval, answers, cost or stores on HotpotQA, quantised caches, or needles in a memory",
        "\n".join(f"{name:10} {what}" for name, what in _SUITES.items()),
        "msa-hf eval retrieval ./smol-msa",
        "msa-hf eval answers ./smol-msa --questions 200 --out answers.json",
        "msa-hf eval cost ./smol-msa --json",
        "msa-hf eval store ./smol-msa --store-documents 100000",
        "msa-hf eval cache smollm2-135m --systems 4bit,k4v3 --peers --plot kl.png",
        "msa-hf eval cache qwen2.5-coder-0.5b --parts mmlu --systems 2.7bit,1.8bit",
        'msa-hf eval compare ./smol-msa --documents ./docs --ask "Which court heard the case?"',
        "msa-hf eval needle ./smol-msa --lengths 10000,100000,1000000 --depths 5 --plot needle.png",
    )
    parser.add_argument("suite", choices=list(_SUITES), metavar="SUITE", help=", ".join(_SUITES))
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a converted model; cache: of any, or a packaged one"
    )
    parser.add_argument("--questions", type=positive, metavar="N", help="use the first N questions")
    parser.add_argument(
        "--memory-questions",
        type=positive,
        default=1000,
        metavar="N",
        help="questions whose paragraphs are the memory (default 1000: the standing benchmark)",
    )
    parser.add_argument(
        "--store-documents",
        type=positive,
        default=100_000,
        metavar="N",
        help="store: documents of the large store (default 100,000)",
    )
    parser.add_argument("--no-encoder", action="store_true", help="retrieval: leave the sentence encoder out")
    parser.add_argument("--cache", metavar="FOLDER", help="where memories are kept between runs")
    parser.add_argument("--out", metavar="FILE", help="write the whole report as JSON, too")
    parser.add_argument(
        "--plot", metavar="FILE", help="retrieval, cache, needle: write a plot, too (needs matplotlib)"
    )
    _add_cache_suite(parser)
    _add_texts_suites(parser)
    add_batch_tokens(parser)
    add_loading(parser)
    parser.set_defaults(run=commands.evaluate)


def _add_cache_suite(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cache suite")
    group.add_argument(
        "--systems",
        type=names,
        metavar="NAME,NAME",
        help="caches: presets such as 4bit, key and value bits such as k4v3, JSON files of settings, dense "
        "(default 4bit,3bit,k2v2)",
    )
    group.add_argument("--key-bits", type=int, metavar="N", help="one more cache with these bits")
    group.add_argument("--value-bits", type=int, metavar="N", help="its values (default: as the keys)")
    group.add_argument(
        "--window", type=int, metavar="N", help="recent tokens kept as they are (as the preset)"
    )
    group.add_argument("--peers", action="store_true", help="install and measure other packages' caches, too")
    group.add_argument(
        "--parts", type=names, metavar="PART,PART", help=f"{_CACHE_PARTS} (default quality,bytes)"
    )
    group.add_argument("--texts", type=positive, metavar="N", help="texts of quality and of length (9 and 4)")
    group.add_argument(
        "--skip-questions", type=int, metavar="N", help="mmlu: leave out the first N of every subject"
    )
    group.add_argument("--contexts", type=integers, metavar="N,N", help="tokens held in speed (2048,8192)")
    group.add_argument(
        "--lengths",
        type=integers,
        metavar="N,N",
        help="tokens of needle (1024,2048,4096,7500; of the suite needle 10000,100000)",
    )


def _add_texts_suites(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compare and needle suites")
    group.add_argument(
        "--documents",
        nargs="+",
        metavar="PATH",
        help="files and folders to ask, or to hide facts in (needle: articles of SQuAD and HotpotQA)",
    )
    group.add_argument("--ask", metavar="TEXT", help="compare: the question")
    group.add_argument(
        "--depths", type=positive, metavar="N", help="needle: how many, from first to last (5)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="needle: of the facts")


if __name__ == "__main__":
    sys.exit(main())
