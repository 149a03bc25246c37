"""Attention on a TurboQuantCache as it is stored: codes, exact tokens and recent window in one softmax.

`model.set_attn_implementation("turboquant")` selects it for any model that uses Transformers' attention
interface. Scores and sums over codes are taken in the rotated basis (`ops.code_scores`, `ops.code_sums`):
queries are rotated once, the output is rotated back once, and the cache is never decoded as a whole.

Axis letters: B batch, H query heads, G key/value heads, Q query tokens, R = H / G * Q rows of a key/value
head, P packed tokens, E exact tokens, L recent tokens, T = P + L, D head dim, M groups with a mean.
"""

from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .ops import code_scores, code_sums, packed_attention
from .packed_states import LayerView, PackedStates

NAME = "turboquant"
_SCORES_AT_ONCE = 1 << 24  # elements of one tile of scores: 64 MB in float32


def turboquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function; keys and values are handles of a TurboQuantCache or dense tensors [B, G, T, D].

    Args:
        query: [B, H, Q, D], the last Q of the T tokens.
        attention_mask: None, [B, T] bool of real tokens (causality is applied here), or [B, 1, Q, T] bool or
            additive, which says everything.
        softcap: logit soft-capping (Gemma 2). s_aux: [H], logits of attention sinks (gpt-oss).
        is_causal: whether causality is applied where the mask leaves it open; None: as `module` says.

    Returns:
        ([B, Q, H, D], None).
    """
    attention = getattr(key, "attention", turboquant_attention)
    if attention is not turboquant_attention:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux, **kwargs}
        return attention(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    view = getattr(key, "packed_view", None) or LayerView((), (), None, 0, None, key, value, 0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not view.packed_length and softcap is None and s_aux is None:
        return _dense_attention(module, query, view, attention_mask, causal, scaling, dropout, **kwargs)
    if view.packed_length:
        output = packed_attention(query, view, attention_mask, causal, scaling, softcap, s_aux)
        if output is not None:
            return output, None
    batch, heads, tokens, _ = query.shape
    at_once = max(1, _SCORES_AT_ONCE // (batch * heads * view.length))
    outputs = []
    for start in range(0, tokens, at_once):
        stop = min(tokens, start + at_once)
        allowed = _allowed(attention_mask, causal, tokens, view.length, start, stop, query.device)
        outputs.append(_attend(query[:, :, start:stop], view, allowed, scaling, softcap, s_aux))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2).contiguous(), None


def turboquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """The mask function: padding [B, T] or None where attention is causal, else a full mask [B, 1, Q, T]."""
    plain = mask_function is causal_mask_function and isinstance(q_offset, int) and kv_offset == 0
    if not plain or q_offset + q_length != kv_length:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, :kv_length].bool()
    if padding.shape[1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]), value=False)
    return None if padding.device.type == "cpu" and padding.all() else padding


AttentionInterface.register(NAME, turboquant_attention)
AttentionMaskInterface.register(NAME, turboquant_mask)
# A process may hold several copies of this code (remote code beside the package), and the last one to come is
# registered. Each cache is nevertheless read by the copy that made it, whose classes and settings it has.
PackedStates.attention = staticmethod(turboquant_attention)


def _dense_attention(module, query, view, attention_mask, causal, scaling, dropout, **kwargs):
    """Transformers' own SDPA over keys and values that are not packed."""
    tokens = query.shape[2]
    no_past = attention_mask is None and tokens == view.length  # SDPA applies causality itself
    if not no_past and (attention_mask is None or attention_mask.dim() == 2):
        attention_mask = _allowed(attention_mask, causal, tokens, view.length, 0, tokens, query.device)
    return sdpa_attention_forward(
        module,
        query,
        view.keys,
        view.values,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=causal,
        **kwargs,
    )


def _allowed(mask, causal, tokens: int, length: int, start: int, stop: int, device) -> torch.Tensor | None:
    """What query tokens start ... stop of `tokens` may attend to: bool or additive [B, 1, Q, T], or None for
    all."""
    if mask is not None and mask.dim() == 4:
        return mask[:, :, start:stop, :length]
    if tokens == 1 or not causal:
        return None if mask is None else mask[:, None, None, :]
    position = torch.arange(length - tokens + start, length - tokens + stop, device=device)
    before = (torch.arange(length, device=device) <= position[:, None])[None, None]
    return before if mask is None else before & mask[:, None, None, :]


def _attend(query, view: LayerView, allowed, scaling, softcap, s_aux) -> torch.Tensor:
    """[B, H, Q, D] for query tokens [B, H, Q, D] whose scores fit in memory."""
    batch, heads, tokens, dim = query.shape
    groups, packed = view.keys.shape[1], view.packed_length
    rows = query.float().reshape(batch, groups, heads // groups * tokens, dim) * scaling
    scores = [rows @ view.keys.float().mT]
    if packed:
        scores.insert(0, _packed_scores(rows, view))
        if view.exact is not None:
            scores.append(rows @ view.exact.keys.float().mT)
    scores = torch.cat(scores, dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(scores, view, allowed, heads // groups)
    if s_aux is not None:
        sink = s_aux.float().view(1, groups, -1, 1, 1).expand(batch, -1, -1, tokens, -1).flatten(2, 3)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)
    if allowed is not None:  # padding may attend to nothing, and gets zeros
        weights = weights.masked_fill(scores.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)
    output = weights[..., packed : view.length] @ view.values.float()
    if packed:
        if view.exact is not None:
            exact = weights[..., view.length : view.length + view.exact.keys.shape[2]]
            output += exact @ view.exact.values.float()
        output += _packed_sums(weights[..., :packed], view)
    return output.view(batch, heads, tokens, -1).to(query.dtype)


def _packed_scores(rows: torch.Tensor, view: LayerView) -> torch.Tensor:
    """[B, G, R, P]: scores of rows [B, G, R, D] with the packed keys, their means included."""
    scores = None
    for part in view.key_codes:
        own = code_scores(part.rotate_queries(rows), part.packed)
        if part.heads is None:
            scores = own
        else:
            scores = own.new_empty(*rows.shape[:3], view.packed_length) if scores is None else scores
            scores.index_copy_(1, part.heads, own)
    if view.means is not None:
        offsets = rows @ view.means.float().mT
        whole, rest = divmod(view.packed_length, view.mean_group)
        if whole:
            groups = scores[..., : whole * view.mean_group].unflatten(-1, (whole, view.mean_group))
            groups += offsets[..., :whole, None]
        if rest:
            scores[..., -rest:] += offsets[..., whole : whole + 1]
    return scores


def _packed_sums(weights: torch.Tensor, view: LayerView) -> torch.Tensor:
    """[B, G, R, D]: sums of the packed values with weights [B, G, R, P]."""
    sums = None
    for part in view.value_codes:
        own = part.restore(code_sums(part.select(weights), part.packed))
        if part.heads is None:
            return own
        sums = own.new_empty(*weights.shape[:3], own.shape[-1]) if sums is None else sums
        sums.index_copy_(1, part.heads, own)
    return sums


def _masked(scores, view: LayerView, allowed, share: int) -> torch.Tensor:
    """Scores [B, G, R, P + L + E] with -inf where a row may not attend; exact tokens count once."""
    positions = None if view.exact is None else view.exact.positions
    if allowed is not None:
        if positions is not None:
            batch, groups, exact = positions.shape
            index = positions.clamp_min(0)[:, :, None].long().expand(-1, -1, allowed.shape[2], -1)
            wide = allowed.expand(batch, groups, -1, -1)
            allowed = torch.cat([wide, wide.gather(-1, index)], dim=-1)
        allowed = allowed.repeat(1, 1, share, 1) if allowed.shape[2] > 1 else allowed
        scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
    if positions is not None:
        empty = (positions < 0)[:, :, None]
        scores[..., view.length :].masked_fill_(empty, -torch.inf)
        # The code of an exact token is hidden; an empty place leaves the score that it meets as it is.
        index = positions.clamp_min(0)[:, :, None].long()
        hidden = torch.where(empty, torch.inf, -torch.inf)
        shape = (*scores.shape[:3], positions.shape[2])
        scores.scatter_reduce_(-1, index.expand(shape), hidden.to(scores.dtype).expand(shape), "amin")
    return scores
