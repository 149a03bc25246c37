"""Zip files of strangers, unpacked without harm: their claims are checked before a byte is written."""

import stat
import zipfile
from pathlib import Path, PurePosixPath

from .limits import Limits
from .refusals import Refused

NESTED = frozenset(
    ".zip .jar .war .whl .apk .tar .gz .tgz .bz2 .tbz .xz .txz .zst .7z .rar .lz4 .cab .iso".split()
)
SMALL = 1 << 20  # bytes below which any ratio is harmless
_PIECE = 1 << 20


def unpack(path: Path, name: str, folder: Path, limits: Limits) -> None:
    """Writes the files of a zip file below `folder`, which must be empty.

    Raises Refused, with the archive's `name`, for what is damaged, encrypted, too large or too many, for
    archives in it, links, and paths that lead out of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check(members, name, limits)
            for member in members:
                if not member.is_dir():
                    _write(archive, member, folder / _relative(member), limits)
    # NotImplementedError: a method of compression that zipfile does not know. RuntimeError: it is encrypted.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise Refused(f"{name} is damaged or no zip file ({error}): zip the files again.") from error


def check(members: list[zipfile.ZipInfo], name: str, limits: Limits) -> None:
    """Raises Refused for an archive that must not be unpacked."""
    files = [member for member in members if not member.is_dir()]
    if not files:
        raise Refused(f"{name} is empty: put text files into it.")
    if len(members) > limits.archive_files:
        raise Refused(f"{name} has {len(members):,} files; at most {limits.archive_files:,} are unpacked.")
    total = sum(member.file_size for member in files)
    if total > limits.archive_bytes:
        most = f"{limits.archive_bytes / 1e6:,.0f} MB"
        raise Refused(f"{name} would unpack to {total / 1e6:,.0f} MB; at most {most} are taken.")
    for member in members:
        _check_member(member, f"{name}: {member.filename[:100]!r}", limits)


def _check_member(member: zipfile.ZipInfo, where: str, limits: Limits) -> None:
    # What zipfile makes of a name hides what stood there: it is cut at a NUL byte, for one.
    written = getattr(member, "orig_filename", member.filename)
    parts = PurePosixPath(written).parts
    if written.startswith("/") or ".." in parts or any(c in written for c in "\\\0") or written[1:2] == ":":
        raise Refused(f"{where} leads out of the archive: zip a plain folder of files.")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Refused(f"{where} is a link or a device: zip the files themselves.")
    if member.flag_bits & 0x1:
        raise Refused(f"{where} is encrypted: zip the files without a password.")
    if PurePosixPath(written).suffix.lower() in NESTED:
        raise Refused(f"{where} is an archive in an archive: unpack it first.")
    if member.file_size > limits.file_bytes:
        raise Refused(
            f"{where} has {member.file_size / 1e6:,.0f} MB; at most {limits.file_bytes / 1e6:,.0f} MB."
        )
    if member.file_size > SMALL and member.file_size > limits.archive_ratio * max(1, member.compress_size):
        raise Refused(f"{where} unpacks to more than {limits.archive_ratio} times its size: it is not taken.")


def _relative(member: zipfile.ZipInfo) -> Path:
    return Path(*PurePosixPath(member.filename).parts)


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, limits: Limits) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(member) as source, open(target, "xb") as file:
        while piece := source.read(_PIECE):
            written += len(piece)
            if written > min(member.file_size, limits.file_bytes):
                raise Refused(f"{member.filename[:100]!r} is larger than its archive says: it is not taken.")
            file.write(piece)
