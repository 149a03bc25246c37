"""Whatever a failing disk refuses: a typed error, and a store that is whole."""

import sys

import pytest

from msa_hf.evaluation import failing_disk
from msa_hf.evaluation.store_faults import fail_preloaded

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or failing_disk.compiler() is None,
    reason="needs LD_PRELOAD and a C compiler for the failing disk",
)


def test_failing_calls_leave_whole_stores(tmp_path):
    report = fail_preloaded(tmp_path, all_faults=False)
    assert report.problems == []
    kinds = {kind for counts in report.hit.values() for kind in counts}
    # Python, SQLite and safetensors each write through calls of their own.
    assert {
        "open",
        "write",
        "pwrite",
        "fsync",
        "fdatasync",
        "unlink",
        "ftruncate",
        "mkdir",
        "killed",
    } <= kinds
    assert set(report.hit) == {
        "create",
        "add",
        "update",
        "delete",
        "undo",
        "redo",
        "compact",
        "compact without history",
        "forget",
        "open after a crash",
        "open for reading",
        "close",
    }
    assert all(counts for counts in report.hit.values())
