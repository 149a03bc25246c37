"""Tiny random models with memory, and the documents and questions that several test modules share."""

import torch
from backbones import tiny_backbone

from msa_hf import MSAConfig, MSAForCausalLM

MEMORY = {
    "router_layers": [1, 2],
    "chunk_size": 8,
    "router_chunk_size": 4,
    "top_k_documents": 3,
    "routers_trained": True,
    "answer_style": "chat",
}
DOCUMENTS = [
    "Ada wrote the first program in 1843.",
    "Water boils at 100 C.",
    "",
    "Paris is the capital of France and lies on the Seine, which flows into the sea at Le Havre.",
    "x",
    "Honey never spoils.",
    "Gold is dense.",
]
QUESTIONS = ["Which city lies on the Seine?", "What spoils?"]


def tiny_model(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = 8, **fields
) -> MSAForCausalLM:
    """Random model on a random backbone; routers as random as the rest."""
    backbone = tiny_backbone(kind, seed, head_dim=head_dim)
    config = MSAConfig.from_backbone(backbone.config, **{**MEMORY, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = MSAForCausalLM(config)
    model.load_state_dict(backbone.state_dict(), strict=False)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
