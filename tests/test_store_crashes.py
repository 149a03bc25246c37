"""A writer that is killed at any moment leaves a whole store, with everything that it had acknowledged."""

import pytest

from msa_hf.evaluation import store_crashes
from msa_hf.evaluation.store_crashes import kill_often

needs_fork = pytest.mark.skipif(
    not hasattr(store_crashes.os, "fork"), reason="forks the writers that it kills"
)


@needs_fork
def test_killed_writers_leave_whole_stores(tmp_path):
    report = kill_often(20, tmp_path, seed=7)
    assert report.problems == []
    assert report.kills == 20 == sum(report.hit.values())
    assert report.hit["end"] < 10  # most of them in the middle of an operation


@needs_fork
def test_the_trial_notices_a_commit_that_is_lost(tmp_path, monkeypatch):
    """Where a writer acknowledges what it did not do, the trial must say so."""
    monkeypatch.setattr(store_crashes.Operation, "run", lambda self, store: None)
    assert kill_often(3, tmp_path, seed=1).problems
