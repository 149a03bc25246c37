"""Hugging Face's ZeroGPU lends a GPU to one call at a time; elsewhere a call is a call."""

from collections.abc import Callable

SECONDS = 120  # that one call may hold the GPU


def on_gpu(function: Callable) -> Callable:
    """The function, run with a GPU where `spaces` is installed.

    There it runs in a process of its own: arguments and results travel, and nothing else is shared.
    """
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=SECONDS)(function)
