"""The running app: its address, and its orderly end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .space import Space

# Gradio's own variables: where uploads arrive, and no word to anyone. It sets the last one itself.
UPLOAD_FOLDER, ANALYTICS, TELEMETRY = (
    "GRADIO_TEMP_DIR",
    "GRADIO_ANALYTICS_ENABLED",
    "HF_HUB_DISABLE_TELEMETRY",
)
# More than may wait for the model at once: an answer that is being written needs one to go on.
THREADS = 96


@contextmanager
def served(
    space: Space, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> Iterator[str]:
    """Serves the page within the block; gives its address. Port None is one that is free.

    Raises OSError if the port cannot be had.
    """
    before = {name: os.environ.get(name) for name in (UPLOAD_FOLDER, ANALYTICS, TELEMETRY)}
    os.environ |= {UPLOAD_FOLDER: str(space.uploads), ANALYTICS: "False", TELEMETRY: "True"}
    try:
        with _serving(space, host, port, share) as url:
            yield url
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _serving(space: Space, host: str, port: int | None, share: bool) -> Iterator[str]:
    import gradio  # noqa: F401  (reads the variables)

    from .page import build_page
    from .theme import STYLES, theme

    blocks = build_page(space)
    try:
        _, url, shared = blocks.launch(
            server_name=host,
            server_port=port or free_port(host),
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            theme=theme(),
            css_paths=STYLES,
            max_threads=THREADS,
            footer_links=["api"],
            max_file_size=space.limits.file_bytes,
            blocked_paths=[str(space.state / "sessions")],
            enable_monitoring=False,
        )
        yield shared or url
    finally:
        space.sessions.close()
        blocks.close(verbose=False)
        space.close()


def free_port(host: str) -> int:
    from msa_hf.serving.server import bind

    with bind(host, 0) as listener:
        return listener.getsockname()[1]
