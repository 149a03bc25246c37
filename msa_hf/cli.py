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
    positive,
)
from .eval_cli import add_evaluation
from .modeling.errors import MSAError
from .push_cli import add_push
from .serve_cli import add_serve
from .space_cli import add_space
from .store_cli import add_reading, add_store_commands


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
    ):
        add(subparsers)
    add_evaluation(subparsers)
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
        "--max-tokens", type=positive, default=128, metavar="N", help="per piece, default 128"
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


if __name__ == "__main__":
    sys.exit(main())
