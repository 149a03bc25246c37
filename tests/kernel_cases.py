"""What the tests of kernels share: the device, the measure of an error, and poisoned allocations."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD_DIMS = (64, 96, 128, 256)
WIDTHS = (1, 2, 3, 4)
SHARES = (1, 4, 8)  # query heads per key/value head
LENGTHS = (1, 63, 129, 1000)


def rms_ratio(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Root mean square of the difference over that of the oracle; NaN where ours holds NaN."""
    ours, oracle = ours.double().cpu(), oracle.double().cpu()
    assert ours.shape == oracle.shape, f"{tuple(ours.shape)} against {tuple(oracle.shape)}"
    return float((ours - oracle).norm() / oracle.norm().clamp_min(1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, memory that nobody wrote reads as NaN, or as 0xA5 in whole numbers."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(
            torch.nan if tensor.is_floating_point() else 0xA5 if tensor.dtype == torch.uint8 else -91
        )

    with mock.patch.object(torch, "empty", filled):
        yield
