"""What lends GPUs on ZeroGPU, as far as the package `spaces` asks it; it notes who asked for what."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit


@dataclass
class ZeroGPUService:
    """Attributes: asked: (path, parameters) of every request."""

    url: str = ""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def of(self, path: str) -> list[dict[str, str]]:
        return [words for own, words in self.asked if own == path]


@contextmanager
def zerogpu_service() -> Iterator[ZeroGPUService]:
    """Serves on 127.0.0.1 within the block; whoever asks gets the one GPU there is."""
    service = ZeroGPUService()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            own = urlsplit(self.path)
            words = {name: values[0] for name, values in parse_qs(own.query).items()}
            service.asked.append((own.path, words))
            token = str(len(service.asked))
            lent = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": token}
            body = json.dumps(lent).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield service
        server.shutdown()
        thread.join()
