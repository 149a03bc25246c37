"""What a Markdown text tells its reader to run, and running it as a reader would."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Block:
    """A block of code: the language that its fence names ("" for none), None if it is indented instead."""

    language: str | None
    text: str


def blocks_of(markdown: str) -> list[Block]:
    """The blocks in their order."""
    tokens = MarkdownIt().parse(markdown)
    kinds = {"fence": lambda token: token.info.strip(), "code_block": lambda token: None}
    return [Block(kinds[token.type](token), token.content) for token in tokens if token.type in kinds]


def environment_of(**variables: str) -> dict[str, str]:
    """Of a process with one thread, this checkout's modules and these variables."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


def paste(code: str, folder: Path, environment: dict[str, str]) -> str:
    """What Python code prints in a process of its own."""
    return run([sys.executable, "-c", code], folder, environment)
