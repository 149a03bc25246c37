"""Router training on a frozen backbone, its data, and the PEFT adapter that it gives (paper section 3.3)."""

from .adapter import load_router, save_router_adapter
from .features import RouterFeatures, encode_features
from .pairs import RouterPair, hotpotqa_pairs, read_pairs, write_pairs
from .router_training import RouterTrainingConfig, RouterTrainingResult, train_router

__all__ = [
    "RouterFeatures",
    "RouterPair",
    "RouterTrainingConfig",
    "RouterTrainingResult",
    "encode_features",
    "hotpotqa_pairs",
    "load_router",
    "read_pairs",
    "save_router_adapter",
    "train_router",
    "write_pairs",
]
