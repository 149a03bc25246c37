"""Damaged and hostile stores: a typed error or an answer; `verify` finds every changed byte of a segment."""

import shutil

import pytest

from msa_hf.evaluation import store_damage, store_hostility
from msa_hf.evaluation.store_damage import Damaged, damage_often, small_stores, try_stores
from msa_hf.evaluation.trial_stores import byte_tokenizer, tiny_model
from msa_hf.modeling.errors import MSAError
from msa_hf.store import MemoryStore, verification
from msa_hf.store.database import SEGMENTS

pytestmark = pytest.mark.skipif(not hasattr(store_damage.os, "fork"), reason="forks who opens the stores")


def test_damaged_files_are_answered_or_refused(tmp_path):
    report = damage_often(2000, tmp_path, seed=11)
    assert report.problems == []
    assert report.stores == 2000
    assert report.answers["MemoryFormatError"] > 500


def test_verify_finds_every_flipped_byte_of_a_segment(tmp_path):
    base = small_stores(tmp_path, tiny_model(), byte_tokenizer())[0]
    with MemoryStore.open(base) as store:
        for path in sorted((base / SEGMENTS).iterdir()):
            whole = path.read_bytes()
            for place in range(0, len(whole), 7):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
                assert any(path.name in problem for problem in store.verify()), place
            path.write_bytes(whole)
        assert store.verify() == []


@pytest.mark.parametrize("kind", store_hostility.SCHEMAS)
def test_a_strange_schema_is_refused(tmp_path, kind):
    base = small_stores(tmp_path, tiny_model(), byte_tokenizer())[0]
    changes = dict(store_hostility.hostile_changes(base))
    store_hostility.apply(base, changes[kind])
    for read_only in (True, False):
        with pytest.raises(MSAError):
            MemoryStore.open(base, read_only=read_only)


def test_hostile_values_are_answered_or_refused(tmp_path):
    report = store_hostility.try_hostile(tmp_path, every=9)
    assert report.problems == []
    assert report.answers["MemoryFormatError"] > 50


def test_the_trial_notices_errors_crashes_and_silence(tmp_path, monkeypatch):
    model, tokenizer = tiny_model(), byte_tokenizer()
    base = small_stores(tmp_path, model, tokenizer)[0]

    now = []

    def make(number, place):
        now.append(number)
        shutil.copytree(base, place)
        if number == 1:
            store_damage.os.kill(store_damage.os.getpid(), store_damage.signal.SIGUSR1)
        return Damaged("none", must_be_found=number == 2)

    def stats(store):
        if now[-1] == 0:
            raise KeyError("untyped")

    monkeypatch.setattr(verification, "stats", stats)
    report = try_stores(range(3), make, tmp_path, model, tokenizer)
    assert report.stores == 3
    found = sorted(report.found)
    assert len(found) == 3
    assert found[0].startswith("crashes") and "KeyError" in found[1] and found[2] == "verify finds nothing"
