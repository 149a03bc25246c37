"""Hugging Face's ZeroGPU lends a GPU to one call at a time; elsewhere a call is a call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isgeneratorfunction

import torch

from msa_hf.modeling.errors import MSAError

SECONDS = 120  # that one call may hold the GPU
DEVICE = "cuda"


@dataclass(frozen=True)
class _Failed:
    """What a call ended with. Of errors that are raised, `spaces` lets no message through."""

    error: MSAError | ValueError


def lends() -> bool:
    """Whether GPUs are lent call by call here. This process has none then: its model belongs on the CPU."""
    try:
        import spaces
    except ImportError:
        return False
    return spaces.GPU(lends) is not lends


def on_gpu(function: Callable, model: torch.nn.Module) -> Callable:
    """The function, which works with the model, run with a lent GPU where GPUs are lent.

    There it runs in a process that was forked from this one and may serve several calls: what was in memory
    before is there, only arguments and results travel, and the model goes to the GPU in that process alone.
    """
    if not lends():
        return function
    import spaces

    streams = isgeneratorfunction(function)

    @spaces.GPU(duration=SECONDS)
    def lent(*words) -> Iterator:
        torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
        model.to(DEVICE)
        try:
            if streams:
                yield from function(*words)
            else:
                yield function(*words)
        except (MSAError, ValueError) as error:
            yield _Failed(error)

    def steps(*words) -> Iterator:
        for step in lent(*words):
            if isinstance(step, _Failed):
                raise step.error
            yield step

    def result(*words):
        [only] = steps(*words)
        return only

    return steps if streams else result
