"""Launch parameters of the kernels, per device.

Chosen ahead of time, so that neither an import nor a first call waits for a search. A device that is not
listed gets the parameters of the nearest older one. benchmarks/sweep.py looks for better ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# kernel -> compute capability -> parameters; (0, 0) serves everything else, the interpreter too. With
# maxnreg the compiler moves no registers to local memory for the sake of one more program on a processor.
PARAMETERS: dict[str, dict[tuple[int, int], dict[str, int]]] = {
    "decode_attention": {
        (0, 0): {"ROWS": 16, "TOKENS": 64, "num_warps": 4, "num_stages": 2},
        (8, 0): {"ROWS": 16, "TOKENS": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 224},
        (9, 0): {"ROWS": 16, "TOKENS": 128, "num_warps": 4, "num_stages": 3},
    },
    "prefill_attention": {
        (0, 0): {"ROWS": 32, "TOKENS": 32, "num_warps": 4, "num_stages": 2},
        (8, 0): {"ROWS": 32, "TOKENS": 16, "num_warps": 4, "num_stages": 2},
        (9, 0): {"ROWS": 128, "TOKENS": 32, "num_warps": 8, "num_stages": 2},
    },
    "combine_splits": {
        (0, 0): {"ROWS": 16, "COLUMNS": 32, "num_warps": 4, "num_stages": 1},
        (8, 0): {"ROWS": 16, "COLUMNS": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255},
    },
    "prepare_questions": {
        (0, 0): {"BLOCK": 16, "num_warps": 4, "num_stages": 1},
        (8, 0): {"BLOCK": 1, "num_warps": 4, "num_stages": 1},
    },
    "encode": {
        (0, 0): {"ROWS": 64, "TILES": 8, "num_warps": 4, "num_stages": 1},
        (8, 0): {"ROWS": 32, "TILES": 8, "num_warps": 8, "num_stages": 1},
        (9, 0): {"ROWS": 64, "TILES": 8, "num_warps": 4, "num_stages": 1},
    },
    "encode_wide": {
        (0, 0): {"ROWS": 32, "TILES": 8, "num_warps": 8, "num_stages": 1},
        (8, 0): {"ROWS": 32, "TILES": 8, "num_warps": 8, "num_stages": 1, "maxnreg": 224},
        (9, 0): {"ROWS": 64, "TILES": 8, "num_warps": 8, "num_stages": 1},
    },
    "route_packed": {
        (0, 0): {"BLOCK": 128, "ROWS": 32, "num_warps": 4, "num_stages": 3},
        (8, 0): {"BLOCK": 64, "ROWS": 32, "num_warps": 4, "num_stages": 3},
        (9, 0): {"BLOCK": 128, "ROWS": 128, "num_warps": 4, "num_stages": 3},
    },
    "route_dense": {
        (0, 0): {"BLOCK": 128, "ROWS": 32, "num_warps": 4, "num_stages": 3},
        (9, 0): {"BLOCK": 128, "ROWS": 128, "num_warps": 4, "num_stages": 3},
    },
    "gather_dense": {(0, 0): {"BLOCK": 32, "num_warps": 4, "num_stages": 1}},
    "gather_packed": {(0, 0): {"BLOCK": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 2}},
    "pool_chunks": {
        (0, 0): {"TOKENS": 32, "COLUMNS": 1024, "num_warps": 4, "num_stages": 1},
        (8, 0): {"TOKENS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 1},
    },
    "document_maxima": {(0, 0): {"BLOCK": 1024, "RUN": 16, "num_warps": 4, "num_stages": 1}},
    "document_means": {(0, 0): {"BLOCK": 128, "num_warps": 1, "num_stages": 1}},
    "top_documents": {
        (0, 0): {"BLOCK": 128, "num_warps": 4, "num_stages": 1},
        (8, 0): {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
    },
}
_assumed_capability: list[tuple[int, int]] = []


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability of a device, (0, 0) for every other kind of device."""
    if _assumed_capability:
        return _assumed_capability[-1]
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@contextmanager
def assume_capability(assumed: tuple[int, int]) -> Iterator[None]:
    """Within the block, every device counts as one of this capability: to compile for one that is absent."""
    _assumed_capability.append(assumed)
    try:
        yield
    finally:
        _assumed_capability.pop()


def launch_parameters(kernel: str, device: torch.device, **changes: int) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of a kernel on a device, as keyword arguments of its launch."""
    table = PARAMETERS[kernel]
    nearest = max(known for known in table if known <= capability(device))
    return {**table[nearest], **changes}


def processors(device: torch.device) -> int:
    """How many programs a device runs side by side at least: its multiprocessors."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(number: int) -> int:
    """The next power of 2. Triton's own is made for kernels and costs microseconds on the host."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, size: int) -> int:
    """Parts of `size` that cover `number`; see `power_of_2`."""
    return -(-number // size)
