"""For tests of the app: a space with a tiny model, and files that it must refuse."""

import io
import stat
import struct
import time
import zipfile
from dataclasses import dataclass

from tiny_models import tiny_model

NILE = "The Nile is a river in Africa. It flows through Cairo."
SEINE = "The Seine is a river in France. It flows through Paris."
MARKUP = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [go](javascript:alert(3)) ${alert(4)} "
    '{{alert(5)}} "><svg onload=alert(6)> `x` &lt;b&gt;'
)
HANG = 120  # seconds after which a test fails; nothing takes as long


def space_model():
    return tiny_model(retrieval="router", max_position_embeddings=1024, lexical_prior=True)


def awaited_client(url, process, errors):
    """A client of the app that a process serves, once it does; `errors`: the file of its complaints."""
    from gradio_client import Client

    end = time.monotonic() + HANG
    while True:
        assert process.poll() is None, errors.read_text()
        assert time.monotonic() < end, f"the app did not start: {errors.read_text()}"
        try:
            return Client(url, verbose=False)
        except Exception:  # until it listens, whatever the client makes of that
            time.sleep(0.2)


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file; entries may have any name."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo("x")
            member.filename, member.compress_type = name, compression
            archive.writestr(member, content)
    return data.getvalue()


def zipped_link(name: str, target: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, target)
    return data.getvalue()


def zipped_encrypted() -> bytes:
    """A zip file whose only entry says that it is encrypted."""
    data = bytearray(zipped({"a.txt": b"text"}, zipfile.ZIP_STORED))
    place = data.index(b"PK\x01\x02") + 8
    data[place : place + 2] = struct.pack("<H", 1)
    return bytes(data)


def pdf(text: str = "", password: str | None = None) -> bytes:
    """A PDF of one page with a line of text, or without any."""
    import pypdf
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(300, 300)
    if text:
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    data = io.BytesIO()
    writer.write(data)
    return data.getvalue()
