"""The parsers of `eval` and `calibrate-cache`."""

import argparse

from . import eval_commands
from .arguments import add_batch_tokens, add_loading, command, integers, names, positive

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


def add_evaluation(subparsers) -> None:
    """Adds `calibrate-cache` and `eval`."""
    _add_calibrate_cache(subparsers)
    _add_eval(subparsers)


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
    parser.add_argument(
        "--questions",
        action="store_true",
        help="and six texts of multiple-choice questions: keeps the letters of few-shot answers",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the calibration")
    parser.add_argument("--no-transforms", action="store_true", help="bits alone: one small JSON file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")
    add_loading(parser)
    parser.set_defaults(run=eval_commands.calibrate_cache)


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
    parser.set_defaults(run=eval_commands.evaluate)


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
