"""Where the Triton kernels come from. Beside remote code, this file holds their source instead.

Only imported when a kernel is wanted. Raises ImportError, saying what is missing.
"""

try:
    from msa_hf import kernels
except ImportError as error:
    raise ImportError(f"the kernels come with msa_hf: {error}") from error

if not kernels.available:
    raise ImportError("the kernels need triton: pip install triton")
