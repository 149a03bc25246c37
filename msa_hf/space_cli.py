"""msa-hf space: its parser, and what it does."""

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from .arguments import add_loading, command, port
from .modeling.errors import MSAError


def add_space(subparsers) -> None:
    """Adds `space`."""
    parser = command(
        subparsers,
        "space",
        "open the app: documents in, questions answered, in a browser",
        "Serves the page until Ctrl-C or SIGTERM. Without a MODEL, SmolLM2-135M is fetched and converted\n"
        "the first time. Every browser has a library of its own; without --state they end with the command.",
        "msa-hf space",
        "msa-hf space ./smol-msa --port 7861 --state ./libraries",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder of a converted model (default: SmolLM2-135M)"
    )
    parser.add_argument("--port", type=port, default=7860, metavar="N", help="default 7860; 0: a free one")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on, default 127.0.0.1")
    parser.add_argument("--state", metavar="DIR", help="keeps the libraries (default: a temporary folder)")
    parser.add_argument(
        "--share", choices=("no", "yes"), default="no", help="a public address from Gradio (default no)"
    )
    add_loading(parser)
    parser.set_defaults(run=space)


def space(options: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MSAError(f"the app needs gradio: pip install '.[space]' ({error})") from error
    from .model_loading import warn_untrained
    from .packaged_model import ready_model
    from .serving.server import bind
    from .space_app.server import served
    from .space_app.space import Space

    bind(options.host, options.port).close()  # before the model, so that a taken port says so at once
    dtype = None if options.dtype == "auto" and options.model is None else options.dtype
    model, tokenizer, name = ready_model(options.model, options.device, dtype)
    warn_untrained(model)
    app = Space(model, tokenizer, name, options.state and Path(options.state))
    over = threading.Event()
    before = {own: signal.signal(own, lambda *_: over.set()) for own in (signal.SIGTERM, signal.SIGINT)}
    try:
        with served(app, options.host, options.port or None, options.share == "yes") as url:
            if options.json:
                print(json.dumps({"url": url, "model": name, "state": options.state}), flush=True)
            else:
                print(f"{name} at {url}", flush=True)
            print("SIGTERM or Ctrl-C ends it", file=sys.stderr)
            over.wait()
    finally:
        app.close()  # also where the page could not be served
        for own, handler in before.items():
            signal.signal(own, handler)
