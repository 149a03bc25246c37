"""What a library holds and takes, beside what a plain cache of its tokens would take."""

from dataclasses import asdict, dataclass
from typing import Any

BFLOAT16 = 2  # bytes of a number


@dataclass(frozen=True)
class Meter:
    """Figures of a library.

    Attributes:
        passages: that the documents were cut into. vector_bytes: of the memory that the model reads.
        cache_bytes: of keys and values of as many tokens in bfloat16.
    """

    documents: int
    passages: int
    tokens: int
    vector_bytes: int
    cache_bytes: int
    most_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.vector_bytes / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_per_token": self.bytes_per_token}


def cache_bytes(config, tokens: int) -> int:
    """Bytes of a plain key/value cache: a key and a value per token, layer and key/value head."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * BFLOAT16 * tokens
