"""What the kernels are measured against, and the plain twins that they must agree with.

Axis letters: B batch, H query heads, G key/value heads, S = H / G, Q query tokens, T tokens, D head dim,
C chunks, W = G * D, K places of a memory prefix.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from operands import Encoding, Gathering
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from msa_hf.modeling import routing_products
from msa_hf.modeling.bit_packing import unpack
from msa_hf.modeling.packed_states import LayerView
from msa_hf.modeling.turboquant import PackedVectors, Transform

Call = Callable[[], torch.Tensor]
BACKENDS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention_twin(query: torch.Tensor, view: LayerView) -> torch.Tensor:
    """Attention over the decoded layer in float32: [B, Q, H, D]. No dispatch can turn it into a kernel."""
    exact = view.exact and replace(view.exact, keys=view.exact.keys.float(), values=view.exact.values.float())
    view = replace(view, keys=view.keys.float(), values=view.values.float(), exact=exact)
    keys, values = view.dense_keys(), view.dense_values()
    batch, heads, tokens, dim = query.shape
    groups, length = keys.shape[1:3]
    place = torch.arange(length, device=query.device)
    later = place[None] > place[-tokens:, None]  # [Q, T]
    outputs = []
    for sample in range(batch):
        rows = query[sample].float().view(groups, -1, dim) * dim**-0.5
        scores = (rows @ keys[sample].mT).unflatten(1, (-1, tokens)).masked_fill_(later, -torch.inf)
        outputs.append((scores.softmax(-1).flatten(1, 2) @ values[sample]).view(heads, tokens, dim))
    return torch.stack(outputs).transpose(1, 2)


def dense_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Call]:
    """SDPA as PyTorch chooses, and for one token by backend: query [B, H, Q, D], the last of the tokens of
    keys and values [B, G, T, D]."""
    batch, heads, tokens, dim = query.shape
    rows = query.reshape(batch, keys.shape[1], -1, dim)  # the query heads of a group as rows of one head
    bias = None if tokens == 1 else causal_lower_right(tokens, keys.shape[2])

    def run(backend: SDPBackend, states: torch.Tensor, **kwargs) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(states, keys, values, **kwargs)

    calls = {"SDPA": lambda: F.scaled_dot_product_attention(query, keys, values, bias, enable_gqa=True)}
    for name, backend in BACKENDS.items() if tokens == 1 else ():
        calls[f"SDPA {name}"] = lambda backend=backend: run(backend, query, enable_gqa=True)
        calls[f"SDPA {name}, heads as rows"] = lambda backend=backend: run(backend, rows)
    return calls


def decoded_attention(query: torch.Tensor, view: LayerView) -> torch.Tensor:
    """Decodes the whole layer, then SDPA."""
    mask = None if query.shape[2] == 1 else causal_lower_right(query.shape[2], view.length)
    keys, values = view.dense_keys(), view.dense_values()
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def routing_twin(arguments: dict, bits: int, chunks_at_once: int = 1 << 17) -> torch.Tensor:
    """Chunk scores [B, C] in float32, from decoded keys."""
    folded, keys = arguments["folded"], arguments["keys"]
    parts = []
    for start in range(0, len(keys), chunks_at_once):
        part = slice(start, start + chunks_at_once)
        rows = keys[part].float()
        if bits:
            table = torch.tensor(arguments["centroids"], device=keys.device)
            rows = _unpacked(keys[part], bits, table) * arguments["levels"][arguments["scales"][part].int()]
        parts.append(torch.einsum("btw,cw->btc", folded.float(), rows.flatten(1)).amax(1))
    return torch.cat(parts, 1)


def _unpacked(codes: torch.Tensor, bits: int, table: torch.Tensor) -> torch.Tensor:
    return table[unpack(codes, bits, codes.shape[-1] * 8 // bits).int()]


def gemm_and_max(folded: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Chunk scores [C] of folded queries [T, W] and keys [C, W] by cuBLAS."""
    return (keys @ folded.t()).amax(1)


def reference_routing(queries: torch.Tensor, keys: torch.Tensor, chunks_at_once: int) -> torch.Tensor:
    """Chunk scores [C] by the reference's formula: scores of every head, their mean, the best token.

    queries [H, T, D], keys [C, G, D].
    """
    heads = queries.shape[0]
    parts = []
    for start in range(0, len(keys), chunks_at_once):
        rows = keys[start : start + chunks_at_once].repeat_interleave(heads // keys.shape[1], dim=1)
        parts.append((queries @ rows.permute(1, 2, 0)).mean(0).amax(0))
    return torch.cat(parts)


def encoding_twin(shape: Encoding, keys, values, means) -> list[PackedVectors]:
    """Codes and scales of keys and values by plain PyTorch."""
    encode = Transform.rotation("hadamard", (shape.dim,)).to(keys.device).encode
    group = torch.arange(shape.tokens, device=keys.device) // shape.mean_group
    states = (keys.double() - means.double().index_select(2, group), values.double())
    return [quantizer.encode(part @ encode) for quantizer, part in zip(shape.quantizers(), states)]


def gathering_twin(shape: Gathering, arguments: dict) -> tuple[torch.Tensor, ...]:
    """Keys and values [B, G, K, D] by indexing, after decoding where they are packed."""
    rows, found = arguments["rows"], []
    for name in ("key", "value"):
        if shape.bits:
            table = torch.tensor(arguments[f"{name}_centroids"], device=rows.device)
            scales = arguments["levels"][arguments[f"{name}_scales"][rows].int()]
            states = _unpacked(arguments[f"{name}_codes"][rows], shape.bits, table) * scales
            states = (states @ arguments[f"{name}_decode"]).to(arguments["dtype"])
        else:
            states = arguments[f"{name}s"][rows].unflatten(2, (shape.groups, -1))
        found.append(states.transpose(1, 2).contiguous())
    return tuple(found)


def pooling_twin(arguments: dict) -> list[torch.Tensor]:
    """Means of chunks by plain PyTorch."""
    return [
        routing_products.pool_chunks(states.flatten(2), arguments["lengths"], size)
        for states, size in zip(arguments["states"], arguments["chunk_sizes"])
    ]


def ranking_twin(arguments: dict, best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices [B, k] of the documents with the best chunks, by plain PyTorch."""
    scores, lengths = arguments["chunk_scores"], arguments["offsets"].diff()
    documents = routing_products.segment_scores(scores.t(), lengths, "max").t()
    return tuple(documents.topk(best, dim=1))
