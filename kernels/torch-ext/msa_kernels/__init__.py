"""Triton kernels of msa_hf, also installed as `msa_hf.kernels`.

`available` names the operators. It is empty without triton, which every one of them needs.
"""

import importlib.util

available: tuple[str, ...] = ()
__all__ = ["available"]

if importlib.util.find_spec("triton") is not None:
    from .attention import decode_attention, prefill_attention
    from .encode import Coding, encode, encode_states, matrix_parts, serves_encoding
    from .gather import gather_dense, gather_packed
    from .pool import pool_chunks
    from .route import document_maxima, document_means, route_scores
    from .top_documents import top_documents

    available = (
        "decode_attention",
        "prefill_attention",
        "encode_states",
        "route_scores",
        "document_maxima",
        "document_means",
        "top_documents",
        "gather_dense",
        "gather_packed",
        "pool_chunks",
    )
    __all__ += ["decode_attention", "prefill_attention"]
    __all__ += ["Coding", "encode", "encode_states", "matrix_parts", "serves_encoding"]
    __all__ += ["route_scores", "document_maxima", "document_means", "top_documents"]
    __all__ += ["gather_dense", "gather_packed", "pool_chunks"]
