"""For tests of the page in a real browser: what the scripts that drive it have, or the reason to skip."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def visitors():
    """The module scripts/space_visitor.py; skips the test where there is nothing to browse with."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    own = of_scripts("space_visitor")
    if own.chromium() is None:
        pytest.skip("there is no Chromium on this machine")
    return own


def of_scripts(name: str):
    """A module that scripts share."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(SCRIPTS))
