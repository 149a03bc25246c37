"""The app as a process of its own, for scripts that visit it."""

import json
import subprocess
import sys
import time
from pathlib import Path


class Served:
    """`msa-hf space` within a block. `url`; `seconds` from its start until the page is served."""

    def __init__(self, model: str | None, state: Path):
        self.command = [sys.executable, "-m", "msa_hf.cli", "space", *([model] if model else [])]
        self.command += ["--port", "0", "--state", str(state), "--json"]

    def __enter__(self) -> "Served":
        begin = time.monotonic()
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.seconds = time.monotonic() - begin
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(60)

    def megabytes(self, name: str) -> float:
        """A figure of /proc: VmHWM, the most there was; RssAnon, without pages of mapped files."""
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as lines:
            [line] = [line for line in lines if line.startswith(f"{name}:")]
        return int(line.split()[1]) / 1000
