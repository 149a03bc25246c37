"""The process around the application: its socket, its signals, and its end."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

from ..modeling.errors import MSAError
from .app import build_app
from .service import Service

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises MSAError if it cannot be had."""
    try:
        return _listener(host, port)
    except OSError as error:
        raise MSAError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def make_server(service: Service):
    """A uvicorn server. SIGTERM and SIGINT end it: running requests are finished within the limit, others
    are sent away, and the store is closed."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None) -> None:
            service.begin_closing()
            await super().shutdown(sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Uvicorn's own raises the signals again at the end; ours is an end as any other.
            try:
                before = {
                    own: signal.signal(own, self.handle_exit) for own in (signal.SIGTERM, signal.SIGINT)
                }
            except ValueError:  # not in the main thread, whose signals belong to another
                before = {}
            try:
                yield
            finally:
                for own, handler in before.items():
                    signal.signal(own, handler)

    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(service.limits.grace)),
    )
    return Server(config)


def serve(service: Service, listener: socket.socket) -> None:
    """Serves until a signal ends it, and closes the store."""
    with contextlib.closing(listener):
        make_server(service).run(sockets=[listener])
