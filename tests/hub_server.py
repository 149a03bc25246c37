"""A small Hub on 127.0.0.1 that huggingface_hub talks to through HF_ENDPOINT.

Covers accounts, creating repositories of every kind, the card check, preupload, the LFS batch with upload and
verification, commits, branches, listings, and downloads with redirects, ranges and ETags. Leaves out Xet,
multipart uploads, pull requests, gated repositories, tags, paged listings and the rate limits' counters.
Contents lie in a folder under their hashes; commits are kept in memory.
"""

import hashlib
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_pages import REGULAR_LIMIT, Handler, Refusal, Repository, Request, Stored
from huggingface_hub import constants


class HubServer:
    """The server and what the tests ask of it; a context manager.

    Attributes:
        tokens: token to (account, may write). requests: what was asked, in order.
        break_uploads, break_downloads: bytes after which a content's connection breaks; None for never.
        breaks_left: how many connections may break. broken: set once one has broken.
        refusal: (pattern of paths, Refusal) to answer with.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens = {"writer": ("user", True), "reader": ("user", False)}
        self.requests: list[Request] = []
        self.break_uploads: int | None = None
        self.break_downloads: int | None = None
        self.breaks_left = 0
        self.broken = threading.Event()
        self.arrived = threading.Condition()
        self.refusal: tuple[str, Refusal] | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.contents_url = f"http://localhost:{port}/contents"  # another host, as the Hub's is

    def __enter__(self) -> "HubServer":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path, token: str | None = "writer") -> dict[str, str]:
        """Variables of a process that uses this Hub and nothing of the user's own; Xet is not served here."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository, by path."""
        repository = self.repository(name, kind)
        found = repository.commits[repository.resolve(revision)]
        return {path: self.object(own.sha256).read_bytes() for path, own in found.items()}

    def add(self, name: str, files: dict[str, bytes], kind: str = "model", branch: str = "main") -> str:
        """A repository with these files, made without any request; the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        stored = {path: self.keep(data, self.is_lfs(path, len(data))) for path, data in files.items()}
        return repository.commit(branch, stored, "added")

    def uploads(self) -> list[str]:
        """Hashes of the contents that were sent in whole, in order."""
        return [own.path.split("/")[-1] for own in self.requests if own.method == "PUT" and own.status == 200]

    def uploaded(self, count: int, limit: float) -> None:
        """Returns once so many contents have arrived. Raises TimeoutError after `limit` seconds."""
        with self.arrived:
            if not self.arrived.wait_for(lambda: len(self.uploads()) >= count, limit):
                raise TimeoutError(f"{len(self.uploads())} of {count} contents have arrived")

    @contextmanager
    def breaking(self, uploads: int | None = None, downloads: int | None = None, times: int = 1):
        """Within the block, connections break after so many bytes of a content."""
        self.broken.clear()
        self.break_uploads, self.break_downloads, self.breaks_left = uploads, downloads, times
        yield
        self.break_uploads = self.break_downloads = None

    @contextmanager
    def refusing(self, pattern: str, status: int, code: str | None = None, message: str = "", headers=()):
        self.refusal = pattern, Refusal(status, code, message, headers)
        yield
        self.refusal = None

    # What the handlers use

    def object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def keep(self, data: bytes, lfs: bool) -> Stored:
        sha256 = hashlib.sha256(data).hexdigest()
        self.object(sha256).write_bytes(data)
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Stored(sha256, len(data), hashlib.sha1(sha256.encode()).hexdigest() if lfs else blob, lfs)

    @staticmethod
    def is_lfs(path: str, size: int) -> bool:
        return size > 0 and (path.endswith(".safetensors") or size > REGULAR_LIMIT)

    def breaks_now(self) -> bool:
        with self.lock:
            self.breaks_left -= 1
            return self.breaks_left >= 0


@contextmanager
def hub_of_this_process(folder: Path, monkeypatch):
    """A server that huggingface_hub takes for the Hub in this process, with its own cache and token."""
    home = folder / "home"
    with HubServer(folder / "hub") as server:
        for name, value in server.environment(home).items():
            monkeypatch.setenv(name, value)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server
