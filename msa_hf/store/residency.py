"""Memory-mapped pages that were read and are not needed soon go back to the system.

A page that a tensor has mapped counts as this process's memory until the system wants it back. Routing reads
every router key once, so without this a search would hold the whole store.
"""

import ctypes
import mmap
from functools import cache

import torch

_PAGE_OUT = 21  # MADV_PAGEOUT of Linux: the pages' content is kept, in the file or, for other memory, in swap


def release(tensor: torch.Tensor) -> None:
    """Lets go of the pages that lie wholly in a tensor; what is read again comes from the file.

    Does nothing where the system cannot.
    """
    advise = _advise()
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None and length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGE_OUT)


@cache
def _advise():
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
