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
