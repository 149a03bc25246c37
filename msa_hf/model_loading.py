"""Converted models by their folders, for commands."""

import logging
import re
from pathlib import Path

from .modeling.errors import MSAError

logger = logging.getLogger(__name__)


def load_model(path: str, device: str | None = None, dtype: str = "auto"):
    """(model, tokenizer) of a converted model, ready to answer. Raises MSAError if it is not one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not Path(path).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise MSAError(f"{path} is no folder of a model: make one with msa-hf convert")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not hasattr(config, "router_layers"):
        raise MSAError(f"{path} is a {config.model_type} model without memory: run msa-hf convert first")
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def warn_untrained(model) -> None:
    if not model.config.routers_trained:
        logger.warning(
            "the routers of this model are untrained, so routing alone picks documents by chance: "
            "train them with msa-hf train-router"
        )


def model_path_of(known: object, memory: str | Path, given: str | None) -> str:
    """The model to load: the given one, or the one that a memory or store remembers."""
    if given:
        return given
    if not isinstance(known, str):
        raise MSAError(f"{memory} does not say which model made it: name it with --model")
    # A memory may come from someone else; what it names is used only if it is already here.
    if not Path(known).is_dir():
        raise MSAError(f"{memory} was made by {known}, which is no folder here: use --model")
    return known
