"""What a measurement ran on: every report carries it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers


@dataclass(frozen=True)
class Environment:
    """Device, thread count and versions of one run."""

    device: str
    threads: int
    python: str
    torch: str
    transformers: str

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}, Python {self.python}, "
            f"torch {self.torch}, transformers {self.transformers}"
        )


def describe_environment(device: str | torch.device = "cpu") -> Environment:
    """The environment of a model that lives on `device`."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Environment(
        device=f"{device.type} ({name})",
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
