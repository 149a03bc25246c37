"""What a forward pass with memory needs to know: positions, which tokens route, and who sees what.

Axis letters: B batch, T tokens, P memory vectors in the prefix.
"""

import torch

from .cache_memory import MemoryReader
from .configuration_msa import MSAConfig


def memory_reader(memory, config: MSAConfig) -> MemoryReader:
    return memory if hasattr(memory, "selected") else MemoryReader(memory, config)


def default_positions(attention_mask, batch: int, tokens: int, past: int, device) -> torch.Tensor:
    """[B, T] positions of the last `tokens` tokens, counting only tokens that are not padding."""
    if attention_mask is None:
        return torch.arange(past, past + tokens, device=device).expand(batch, -1)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:].to(device)


def check_question_mask(question_mask, attention_mask, batch: int, tokens: int, device) -> torch.Tensor:
    """[B, T] bool; ValueError if a row has no token to route with."""
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if attention_mask is not None:
        mask = mask & attention_mask[:, -tokens:].to(device, torch.bool)
    if question_mask is not None:
        if question_mask.shape != (batch, tokens):
            raise ValueError(
                f"question_mask must have shape {(batch, tokens)}; got {tuple(question_mask.shape)}"
            )
        mask = mask & question_mask.to(device, torch.bool)
    if not mask.any(1).all():
        rows = (~mask.any(1)).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"every sample needs at least one question token to route with; rows {rows} have none"
        )
    return mask


def memory_attention_mask(
    prefix_mask: torch.Tensor | None,
    memory_mask: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past: int,
    start: int,
    stop: int,
    like: torch.Tensor,
    causal_without_mask: bool,
) -> torch.Tensor | None:
    """[B, 1, T, P + past + stop] bool for tokens `start` to `stop`: memory prefix, then causal local tokens.

    Every token sees itself, padding too, so that no row of the softmax is empty.

    Args:
        prefix_mask: [B, P], memory vectors that are real. memory_mask: [B, T], tokens that may read them.
        like: a tensor with the batch size and device.
        causal_without_mask: the attention is causal by itself when it gets no mask, as sdpa is.

    Returns:
        None where no mask is needed: nothing is hidden, or only by plain causality.
    """
    tokens = stop - start
    plain = attention_mask is None or bool(attention_mask.all())
    if plain and tokens == 1 and memory_mask is None and (prefix_mask is None or bool(prefix_mask.all())):
        return None
    if (
        plain
        and causal_without_mask
        and past + start == 0
        and (prefix_mask is None or not prefix_mask.numel())
    ):
        return None
    keys = torch.arange(past + stop, device=like.device)
    queries = torch.arange(past + start, past + stop, device=like.device)[:, None]
    local = (keys <= queries)[None]
    if not plain:
        local = local & attention_mask[:, None, : past + stop].to(like.device, torch.bool)
    local = (local | (keys == queries)).expand(like.shape[0], -1, -1)
    if prefix_mask is None:
        return local[:, None]
    memory = prefix_mask[:, None, :].expand(-1, tokens, -1)
    if memory_mask is not None:
        memory = memory & memory_mask[:, start:stop, None]
    return torch.cat([memory, local], dim=2)[:, None]


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What eager attention adds to its scores: 0 where the bool mask is True, else the lowest number."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
