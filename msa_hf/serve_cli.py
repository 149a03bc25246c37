"""msa-hf serve: its parser, and what it does."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from .arguments import add_loading, add_store_settings, byte_count, command, port, positive
from .modeling.errors import MSAError

logger = logging.getLogger(__name__)


def add_serve(subparsers) -> None:
    """Adds `serve`."""
    parser = command(
        subparsers,
        "serve",
        "answer questions from a store over HTTP, for OpenAI's clients",
        "POST /v1/chat/completions, GET /v1/models, POST GET DELETE /v1/memory/documents, GET /health,\n"
        "GET /metrics. Every request but /health needs a bearer token: a file has one per line, each with\n"
        "the namespaces that it may read and write, or none for all; without a file one token is made and\n"
        "printed. The store is held open for writing until SIGTERM or SIGINT.",
        "msa-hf serve ./smol-msa --store ./notes",
        "msa-hf serve ./smol-msa --store ./notes --port 9000 --token-file tokens.txt --max-concurrent 2",
        'echo "$(openssl rand -hex 24) manuals,default" > tokens.txt   # a token for two namespaces',
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a converted model")
    parser.add_argument("--store", required=True, metavar="DIR", help="made if it is not there")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on, default 127.0.0.1")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="default 8000; 0: a free one")
    parser.add_argument("--name", help="of the model, for clients (default: of its folder)")
    parser.add_argument("--token-file", metavar="FILE", help="lines of TOKEN [NAMESPACE,NAMESPACE...]")
    parser.add_argument(
        "--namespace", action="append", metavar="NAME", help="to serve; may be repeated (default: all)"
    )
    for flag, kind, default, what in (
        ("max-concurrent", positive, 1, "generations at once"),
        ("max-queue", _count, 64, "requests that may wait for their turn"),
        ("max-body", byte_count, 16 << 20, "bytes of a request, as 16MiB"),
        ("max-tokens", positive, 128, "tokens of an answer for which a request names no number"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument(
        "--timeout", type=_seconds, default=300.0, metavar="SECONDS", help="of a request (300)"
    )
    parser.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="SECONDS", help="to finish what runs at the end (30)"
    )
    add_store_settings(parser)
    add_loading(parser)
    parser.set_defaults(run=serve)


def serve(options: argparse.Namespace) -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MSAError(f"serve needs starlette and uvicorn: pip install 'msa-hf[serve]' ({error})") from error
    from .model_loading import load_model, warn_untrained
    from .serving.limits import Limits
    from .serving.server import bind
    from .serving.server import serve as serve_until_signal
    from .serving.service import Service
    from .serving.tokens import Tokens
    from .store_opening import is_store, open_or_create

    token = None
    if options.token_file:
        tokens = Tokens.from_file(options.token_file)
        if os.stat(options.token_file).st_mode & 0o077:
            logger.warning("%s can be read by other users: chmod 600 it", options.token_file)
    else:
        tokens, token = Tokens.generated()
    limits = Limits(
        concurrent=options.max_concurrent,
        waiting=options.max_queue,
        body=options.max_body,
        seconds=options.timeout,
        grace=options.grace,
        answer_tokens=options.max_tokens,
    )
    listener = bind(options.host, options.port)  # before the model, so that a taken port says so at once
    try:
        if is_store(options.store) and options.dtype == "auto":
            options.dtype = _dtype_of_store(options.store)
        model, tokenizer = load_model(options.model, options.device, options.dtype)
        warn_untrained(model)
        store = open_or_create(options, model, tokenizer, options.model)
    except BaseException:
        listener.close()
        raise
    name = options.name or Path(options.model.rstrip("/")).name
    service = Service(model, tokenizer, store, tokens, name, limits, options.namespace)
    host, port = listener.getsockname()[:2]
    _announce(f"http://{f'[{host}]' if ':' in host else host}:{port}", name, token, options)
    serve_until_signal(service, listener)


def _announce(url: str, name: str, token: str | None, options: argparse.Namespace) -> None:
    """Where the server is, and its token, which is shown only here."""
    if options.json:
        print(json.dumps({"url": url, "model": name, "store": options.store, "token": token}), flush=True)
        return
    print(f"{name} with {options.store} at {url}/v1", flush=True)
    if token is not None:
        print(f"token: {token}", flush=True)
    print("SIGTERM or Ctrl-C ends it", file=sys.stderr)


def _dtype_of_store(store: str) -> str:
    from .store import MemoryStore

    with MemoryStore.open(store, read_only=True) as opened:
        return opened.provenance.dtype


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 < (number := float(text)) < 1e9:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return number
