"""Tiny random models of the architectures that can be converted."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BACKBONES = ("llama", "mistral", "qwen2", "qwen3")
SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Architectures for caches: name -> (model type, fields). Group sizes 1, 2 and 4, head dims that are no powers
# of 2, layers with a sliding window, soft-capping, biased keys, layers of linear attention.
CACHE_BACKBONES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "head_dim": 12}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4, "head_dim": 10}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {"num_key_value_heads": 1, "num_attention_heads": 2}),  # head dim 32 / 2
}


def cache_backbone(name: str, seed: int = 0, **fields) -> PreTrainedModel:
    kind, own = CACHE_BACKBONES[name]
    model = tiny_backbone(kind, seed, **{**own, **fields})
    model.generation_config.eos_token_id = None
    return model


def tiny_backbone(kind: str, seed: int = 0, **fields) -> PreTrainedModel:
    """Random Transformers model of one architecture; weights large enough that its logits differ visibly."""
    fields = {**SMALL, **({"sliding_window": None} if kind == "mistral" else {}), **fields}
    config = AutoConfig.for_model(kind, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, mean=float("norm" in name), std=0.3)
    return model
