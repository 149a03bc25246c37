"""Triton kernels of msa_hf, also installed as `msa_hf.kernels`.

`available` names the operators. It is empty without triton, which every one of them needs.
"""

import importlib.util

__all__ = []

if importlib.util.find_spec("triton") is not None:
    from .attention import decode_attention, prefill_attention

    __all__ += ["decode_attention", "prefill_attention"]

available: tuple[str, ...] = tuple(__all__)
