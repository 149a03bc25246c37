"""Where the Triton kernels come from. Beside remote code, this file holds their source instead."""

from typing import Any


def load_kernels() -> Any:
    """The package of the kernels. Raises ImportError, saying what is missing."""
    try:
        import msa_hf.kernels
    except ImportError as error:
        raise ImportError(f"the kernels come with msa_hf: {error}") from error
    if not msa_hf.kernels.available:
        raise ImportError("the kernels need triton: pip install triton")
    return msa_hf.kernels
