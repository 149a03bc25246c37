"""Launch parameters of the kernels, per device.

Chosen ahead of time, so that neither an import nor a first call waits for a search. A device that is not
listed gets the parameters of the nearest older one. benchmarks/benchmark.py --sweep prints better ones.
"""

import torch

# kernel -> compute capability -> parameters; (0, 0) serves everything else, the interpreter too.
PARAMETERS: dict[str, dict[tuple[int, int], dict[str, int]]] = {}


def launch_parameters(kernel: str, device: torch.device, **changes: int) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of a kernel on a device, as keyword arguments of its launch."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    table = PARAMETERS[kernel]
    nearest = max(known for known in table if known <= capability)
    return {**table[nearest], **changes}
