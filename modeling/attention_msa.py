"""The decoder layer: causal attention over [memory prefix | local tokens], and the routers of router layers.

Axis letters: B batch, T tokens, E hidden size, H query heads, G key/value heads, D head dim, W = G * D, R
router chunks.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .attention_turboquant import NAME as TURBOQUANT_ATTENTION
from .cache_memory import MemoryPrefix
from .configuration_msa import MSAConfig


class MSAAttention(nn.Module):
    """Causal attention over [memory prefix | local tokens]; in router layers it also has the routers."""

    def __init__(self, config: MSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if layer_idx in config.router_layers and config.separate_router:
            # One-module Sequentials, because the reference's checkpoints name these weights
            # router_q_proj.0.weight.
            self.router_q_proj = nn.Sequential(nn.Linear(config.hidden_size, query_width, bias=False))
            self.router_k_proj = nn.Sequential(nn.Linear(config.hidden_size, key_width, bias=False))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def queries(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        """[B, H, T, D] after q norm and RoPE."""
        queries = self._heads(self.q_proj(hidden_states))
        queries = (self.q_norm(queries) if self.config.qk_norm else queries).transpose(1, 2)
        return apply_rotary_pos_emb(queries, queries[:, :0], *position_embeddings)[0]

    def keys_values(
        self, hidden_states: torch.Tensor, position_embeddings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K (after k norm and RoPE) and V, [B, G, T, D] each."""
        keys = self._heads(self.k_proj(hidden_states))
        keys = (self.k_norm(keys) if self.config.qk_norm else keys).transpose(1, 2)
        values = self._heads(self.v_proj(hidden_states)).transpose(1, 2)
        return apply_rotary_pos_emb(keys, keys[:, :0], *position_embeddings)[0], values

    def router_queries(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        """[B, H, T, D], normalised and scaled as `MSAConfig.score_normalization` says (paper section 3.2)."""
        if self.config.separate_router:
            queries = self._heads(self.router_q_proj(hidden_states)).transpose(1, 2)
        else:
            queries = self.queries(hidden_states, position_embeddings)
        if self.config.score_normalization == "cosine":
            queries = F.normalize(queries, dim=-1)
        return queries * self.config.score_scale

    def router_keys(self, pooled: torch.Tensor) -> torch.Tensor:
        """Router keys [R, W] of chunk means: of the hidden states [R, E] for separate routers, else of K [R,
        W].

        Pooling and the linear map commute, so the map runs once per chunk instead of once per token.
        """
        keys = self.router_k_proj(pooled) if self.config.separate_router else pooled
        if self.config.score_normalization == "dot":
            return keys
        return F.normalize(self._heads(keys), dim=-1).flatten(-2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        memory_prefix: MemoryPrefix | None = None,
        recorder: Callable | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        queries = self.queries(hidden_states, position_embeddings)
        keys, values = self.keys_values(hidden_states, position_embeddings)
        if recorder is not None:
            recorder(self.layer_idx, hidden_states, keys, values)
        if memory_prefix is not None:
            keys = torch.cat([memory_prefix.keys, keys], dim=2)
            values = torch.cat([memory_prefix.values, values], dim=2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and hasattr(keys, "packed_view"):
            implementation = TURBOQUANT_ATTENTION  # takes the same masks and reads codes
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class MSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MSAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MSAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
