"""What a small Hub answers: one class for a connection, and the pages that it knows.

`hub_server` starts it. Names and errors are those that huggingface_hub asks for and understands.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from hub_server import HubServer

KINDS = ("model", "dataset", "space", "kernel")
REGULAR_LIMIT = 10 * 1024**2  # the Hub takes larger files as LFS only
PIECE = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A file of a commit: its content's SHA-256, and the id that the Hub names it by."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    def listed(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Repository:
    kind: str
    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Stored], message: str) -> str:
        text = json.dumps([self.name, branch, len(self.commits), message, sorted(files)])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    range: str | None
    received: int = 0
    status: int = 0


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, code: str | None = None, message: str = "", headers=()):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        """The tests read `HubServer.requests` instead."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.url, self.query = unquote(parts.path), parse_qs(parts.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.request_log = Request(self.command, self.path, token, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(self.request_log)
        try:
            if self.hub.refusal and re.search(self.hub.refusal[0], self.path):
                raise self.hub.refusal[1]
            if token is not None and token not in self.hub.tokens:
                raise Refusal(401, message="Invalid credentials in Authorization header")
            self.account, self.may_write = self.hub.tokens.get(token, (None, False))
            for method, pattern, answer in _ROUTES:
                # Names of branches may hold an encoded slash, so the pattern meets the path as it was sent.
                found = re.fullmatch(pattern, parts.path)
                if found and self.command in method:
                    answer(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
                    return
            raise Refusal(404, message=f"no such page: {self.command} {self.path}")
        except Refusal as refusal:
            self._refuse(refusal)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    # Reading and writing

    def _body(self, target=None) -> bytes:
        """The request's body; with `target`, written there instead, and cut off where the hub breaks."""
        data = bytearray()
        for piece in self._pieces():
            self.request_log.received += len(piece)
            target.write(piece) if target else data.extend(piece)
            limit = self.hub.break_uploads
            if target and limit is not None and self.request_log.received >= limit and self.hub.breaks_now():
                self._break()
        return bytes(data)

    def _pieces(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the client has gone")
            left -= len(piece)
            yield piece

    def _break(self) -> None:
        """Ends the connection as a failing network does: at once, without an answer."""
        self.hub.broken.set()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionAbortedError("broken on purpose")

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError, OSError):
            self.close_connection = True  # broken on purpose, or the client was killed

    def finish(self) -> None:
        try:
            super().finish()
        except (ValueError, OSError):
            pass  # the socket is closed already

    def _send(self, status: int, data: bytes = b"", headers=()) -> None:
        self.request_log.status = status
        self.send_response(status)
        own = {"Content-Length": str(len(data)), "Content-Type": "application/json", **dict(headers)}
        for name, value in own.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status: int = 200, headers=()) -> None:
        self._send(status, json.dumps(value).encode(), headers)

    def _refuse(self, refusal: Refusal) -> None:
        headers = dict(refusal.headers)
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        if refusal.message:
            headers["X-Error-Message"] = refusal.message
        self.close_connection = True  # the body, if any, was not read
        self._json({"error": refusal.message}, refusal.status, headers | {"Connection": "close"})

    # Who may do what

    def _repository(self, kind: str, name: str, writing: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        owner = name.split("/")[0]
        if repository is None or repository.private and self.account != owner:
            if self.account is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if writing and (self.account != owner or not self.may_write):
            raise Refusal(403, message="You don't have the required permissions to perform this action")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # Pages

    def whoami(self) -> None:
        if self.account is None:
            raise Refusal(401, message="Invalid username or password.")
        self._json({"type": "user", "name": self.account, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self._body())
        if self.account is None:
            raise Refusal(401, message="Invalid username or password.")
        owner = wanted.get("organization") or self.account
        if owner != self.account or not self.may_write:
            raise Refusal(
                403, message=f"You don't have the rights to create a {wanted['type']} under {owner}"
            )
        kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        page = {"url": f"{self.hub.url}/{prefix}{name}", "name": name}
        if (kind, name) in self.hub.repositories:
            self._json({"error": "You already created this repo", **page}, 409)
            return
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        repository = self.hub.repositories[kind, name] = Repository(kind, name, private)
        repository.commit("main", {".gitattributes": self.hub.keep(b"*.safetensors\n", False)}, "initial")
        self._json(page)

    def validate_yaml(self) -> None:
        """The Hub's own check knows many fields; this one takes what parses and has good kinds of values."""
        content = json.loads(self._body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.S)
        if not found:
            self._json(
                {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
            )
            return
        data, errors = yaml.safe_load(found[1]), []
        for name, kinds in _METADATA.items():
            if name in data and not isinstance(data[name], kinds):
                errors.append({"message": f'"{name}" must be {kinds}'})
        if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
            errors.append(
                {"message": '"base_model_relation" must be one of adapter, merge, quantized, finetune'}
            )
        if not re.fullmatch(r"[a-z0-9.+-]+", data.get("license", "unknown")):
            errors.append({"message": '"license" must be a known identifier'})
        self._json({"warnings": [], "errors": errors}, 400 if errors else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        wanted = json.loads(self._body())
        repository = self._repository(kind, name, writing=True)
        present = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for file in wanted["files"]:
            mode = "lfs" if self.hub.is_lfs(file["path"], file["size"]) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if own := present.get(file["path"]):
                answer["oid"] = own.sha256 if own.lfs else own.oid
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, prefix: str, name: str) -> None:
        wanted = json.loads(self._body())
        self._repository(_kind(prefix), name, writing=True)
        objects = []
        for own in wanted["objects"]:
            answer = {"oid": own["oid"], "size": own["size"]}
            if not self.hub.object(own["oid"]).is_file():
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{own['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        partial = self.hub.folder / f"partial-{id(self)}-{oid}"
        try:
            with open(partial, "wb") as file:
                self._body(file)
            if hashlib.sha256(partial.read_bytes()).hexdigest() != oid:
                raise Refusal(400, message="the content has another hash")
            partial.replace(self.hub.object(oid))
        finally:
            partial.unlink(missing_ok=True)
        self._send(200)
        with self.hub.arrived:
            self.hub.arrived.notify_all()

    def lfs_verify(self) -> None:
        wanted = json.loads(self._body())
        path = self.hub.object(wanted["oid"])
        if not path.is_file() or path.stat().st_size != wanted["size"]:
            raise Refusal(422, message="the upload is not complete")
        self._json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        repository = self._repository(kind, name, writing=True)
        files = dict(repository.commits[self._commit_of(repository, revision)])
        message = lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                if len(data) > REGULAR_LIMIT:
                    raise Refusal(400, message=f"{value['path']} is larger than 10 MB: use LFS")
                files[value["path"]] = self.hub.keep(data, False)
            elif line["key"] == "lfsFile":
                if not self.hub.object(value["oid"]).is_file():
                    raise Refusal(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.keep(self.hub.object(value["oid"]).read_bytes(), True)
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        oid = repository.commit(revision, files, message)
        prefix = "" if kind == "model" else f"{kind}s/"
        self._json({"commitUrl": f"{self.hub.url}/{prefix}{name}/commit/{oid}", "commitOid": oid})

    def branch(self, kind: str, name: str, branch: str) -> None:
        wanted = json.loads(self._body() or b"{}")
        repository = self._repository(kind, name, writing=True)
        if branch in repository.branches:
            raise Refusal(409, message="Reference already exists")
        start = self._commit_of(repository, wanted.get("startingPoint") or "main")
        repository.branches[branch] = start
        self._json({})

    def refs(self, kind: str, name: str) -> None:
        repository = self._repository(kind, name)
        branches = [
            {"name": own, "ref": f"refs/heads/{own}", "targetCommit": oid}
            for own, oid in repository.branches.items()
        ]
        self._json({"branches": branches, "converts": [], "tags": []})

    def info(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        self._json({"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision)
        folder = path.strip("/") + "/" if path.strip("/") else ""
        entries, folders = [], set()
        for own, stored in sorted(repository.commits[oid].items()):
            if not own.startswith(folder):
                continue
            inner = own[len(folder) :]
            if "/" in inner:
                folders.add(folder + inner.split("/")[0])
            if "/" not in inner or self.query.get("recursive", ["false"])[0].lower() == "true":
                entries.append(stored.listed(own))
        if folder and not entries and not folders:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        entries += [{"type": "directory", "path": own, "size": 0, "oid": "0" * 40} for own in sorted(folders)]
        self._json(entries, headers={"X-Repo-Commit": oid})

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        body = self._body()
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
        repository = self._repository(kind, name)
        files = repository.commits[self._commit_of(repository, revision)]
        self._json([files[path].listed(path) for path in wanted if path in files])

    def resolve(self, prefix: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(_kind(prefix), name)
        oid = self._commit_of(repository, revision)
        stored = repository.commits[oid].get(path)
        if stored is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{stored.oid}"'}
        if stored.lfs:
            headers |= {
                "Location": f"{self.hub.contents_url}/{stored.sha256}",
                "X-Linked-ETag": f'"{stored.sha256}"',
                "X-Linked-Size": str(stored.size),
            }
            self._send(302, b"", headers)
            return
        self._content(stored.sha256, headers)

    def content(self, sha256: str) -> None:
        self._content(sha256, {"ETag": f'"{sha256}"'})

    def _content(self, sha256: str, headers: dict[str, str]) -> None:
        data = self.hub.object(sha256).read_bytes()
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            if start >= len(data):
                raise Refusal(416, headers={"Content-Range": f"bytes */{len(data)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            data, status = data[start : end + 1], 206
        limit = self.hub.break_downloads
        if limit is not None and self.command == "GET" and limit < len(data) and self.hub.breaks_now():
            self.request_log.status = status
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.hub.broken.set()
            self.connection.shutdown(socket.SHUT_WR)  # what was written arrives, the rest does not
            self.close_connection = True
            return
        self._send(status, data, headers | {"Accept-Ranges": "bytes"})


def _kind(prefix: str) -> str:
    return prefix.removesuffix("s/") or "model"


_METADATA = {
    "license": str,
    "base_model": (str, list),
    "tags": list,
    "library_name": str,
    "pipeline_tag": str,
    "datasets": (str, list),
    "model-index": list,
    "configs": list,
    "pretty_name": str,
}
_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>{'|'.join(KINDS)})s/{_NAME}"
_PREFIX = rf"/(?P<prefix>(?:{'|'.join(KINDS[1:])})s/)?{_NAME}"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"{_API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), rf"{_API}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST",), rf"{_API}/branch/(?P<branch>[^/]+)", Handler.branch),
    (("POST",), rf"{_API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (("GET",), rf"{_API}/refs", Handler.refs),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)(?P<path>/.+)?", Handler.tree),
    (("GET",), rf"{_API}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (("POST",), rf"{_PREFIX}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    (("POST",), r"/lfs-verify", Handler.lfs_verify),
    (("GET", "HEAD"), r"/contents/(?P<sha256>[0-9a-f]{64})", Handler.content),
    (("GET", "HEAD"), rf"{_PREFIX}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
