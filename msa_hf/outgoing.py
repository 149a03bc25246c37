"""Which files of a folder may go to the Hub: no secrets, pickles, files from outside or too large ones."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .hub_errors import PushRefusedError

FILE_LIMIT = 50 * 1000**3  # bytes of a file, which the Hub takes at most
CARD_LIMIT = TEXT_LIMIT = 10 * 1024**2  # of a card, and of a text that is no LFS file
LFS_SUFFIXES = {".safetensors", ".model", ".png", ".jpg", ".gif"}

_LEFT_OUT = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store"}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_SECRET_NAMES = (
    ".env", ".env.*", "*.env", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12",
    "*.pfx", "*.kdbx", "*.keystore", ".netrc", "_netrc", ".npmrc", ".pypirc", ".git-credentials", ".htpasswd",
    "credentials", "credentials.*", "secrets.*", "token", "stored_tokens",
)  # fmt: skip
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"(?:\\[nr]|\s)*(?:Proc-Type[^=]{0,200})?[A-Za-z0-9+/:]{24}",
    "an AWS access key": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an API key": rb"(?<![A-Za-z0-9_-])(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|AIza[A-Za-z0-9_-]{35})",
    "a Slack token": rb"(?<![A-Za-z0-9_])xox[abprs]-[A-Za-z0-9-]{20,}",
}
_SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in _SECRETS.values()))
_PIECE, _OVERLAP = 1 << 20, 1 << 12  # bytes read at once; more than the longest secret that is looked for


@dataclass(frozen=True)
class OutgoingFile:
    """A file of a push.

    Args:
        path: in the repository. content: where it lies, or its bytes. size: bytes. lfs: whether the Hub is
            expected to keep it as an LFS file; the Hub decides in the end.
    """

    path: str
    content: Path | bytes
    size: int
    lfs: bool

    @classmethod
    def of(cls, path: str, content: Path | bytes) -> "OutgoingFile":
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lfs = size > TEXT_LIMIT or Path(path).suffix in LFS_SUFFIXES
        return cls(path, content, size, lfs)


def outgoing_files(
    folder: Path, suffixes: Collection[str], ignored: Collection[str] = ()
) -> list[OutgoingFile]:
    """The files of `folder` with their paths in it, all of them checked.

    Args:
        suffixes: of the files that this kind of folder holds; "" is for LICENSE and the like.
        ignored: paths that are left out, of folders with all that is in them.

    Raises:
        PushRefusedError: naming the first file that must not go, and why.
    """
    files = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if any(name == left_out or name.startswith(f"{left_out}/") for left_out in ignored):
            continue
        check_name(path, name)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PushRefusedError(
                f"{path} is a link to {path.resolve()}, outside of {folder}: copy it there"
            )
        if path.suffix in _PICKLES:
            raise PushRefusedError(
                f"{path} is of a kind that can run code when it is loaded (a pickle): keep weights in "
                "safetensors, and move this file elsewhere"
            )
        if path.suffix not in suffixes or not path.suffix and path.name not in ("LICENSE", "NOTICE"):
            raise PushRefusedError(f"{path} does not belong to this kind of folder: move it elsewhere")
        files.append(check_file(path, name))
    return files


def check_name(path: Path, name: str) -> None:
    """Raises PushRefusedError for names that secrets have."""
    for part in Path(name).parts:
        if part in (".ssh", ".aws", ".gnupg") or any(fnmatch(part.lower(), own) for own in _SECRET_NAMES):
            raise PushRefusedError(f"{path} has the name of a secret: move it elsewhere, and never push it")


def check_file(path: Path, name: str) -> OutgoingFile:
    """The file, once size and content were checked. Raises PushRefusedError."""
    file = OutgoingFile.of(name, path)
    if file.size > FILE_LIMIT:
        limit = f"{FILE_LIMIT // 1000**3} GB"
        raise PushRefusedError(f"{path} has {file.size} bytes, and the Hub takes {limit} a file: split it")
    if path.suffix == ".safetensors":
        _check_safetensors(path, file.size)
    elif found := secret_in(path):
        raise PushRefusedError(f"{path} holds {found[0]} in line {found[1]}: take it out, and renounce it")
    return file


def check_card(text: str) -> None:
    if len(text.encode()) > CARD_LIMIT:
        raise PushRefusedError(f"the card is larger than {CARD_LIMIT} bytes: shorten README.md")


def secret_in(path: Path) -> tuple[str, int] | None:
    """(what, line) of the first secret that the file holds, which is never shown; None if there is none."""
    lines, kept = 1, b""
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            piece = kept + piece
            if found := _SECRET.search(piece):
                what = list(_SECRETS)[found.lastindex - 1]
                return what, lines + piece.count(b"\n", 0, found.start())
            kept = piece[-_OVERLAP:]
            lines += piece.count(b"\n", 0, len(piece) - len(kept))
    return None


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in _LEFT_OUT:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_dir():
            raise PushRefusedError(f"{path} is a link to a folder: copy the folder there")
        else:
            yield path


def _check_safetensors(path: Path, size: int) -> None:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size, 100 * 1000**2) else None
        ends = [own["data_offsets"][1] for name, own in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        whole = False
    if not whole:
        raise PushRefusedError(f"{path} is cut off or no safetensors file: save it again")
