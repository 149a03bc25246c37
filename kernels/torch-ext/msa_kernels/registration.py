"""How kernels become operators of torch: a namespace of their own, with fakes for torch.compile."""

import hashlib
from collections.abc import Callable, Iterable
from functools import wraps

import torch
import triton
import triton.language as tl

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Copies of this package (installed, loaded from the Hub, beside remote code) may live in one process; each
# registers its operators under the name that it was imported by.
NAMESPACE = "msa_kernels_" + hashlib.sha256((__package__ or __name__).encode()).hexdigest()[:8]


def operator(fake: Callable | None = None, mutates: Iterable[str] = ()) -> Callable:
    """Decorator: a launcher becomes the operator `NAMESPACE::name of the function`.

    torch.compile sees the operator. Elsewhere the launcher is called as it is, because torch's way to an
    operator takes a multiple of the launch, and a decode step has one in every layer.

    Args:
        fake: the outputs' shapes and types, from the same arguments; None for an operator without outputs.
        mutates: names of the arguments that it writes to.
    """

    def register(function: Callable) -> Callable:
        name = f"{NAMESPACE}::{function.__name__}"
        defined = torch.library.custom_op(name, function, mutates_args=tuple(mutates))
        defined.register_fake(fake or (lambda *args, **kwargs: None))

        @wraps(function)
        def call(*args, **kwargs):
            return (defined if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return register


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device, instead of being compiled for a GPU."""
    return bool(triton.knobs.runtime.interpret)
