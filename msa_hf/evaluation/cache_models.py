"""Plain causal language models to measure caches with: any folder, or one of two that come from wheels.

The two are unpacked from GGUF once and kept as a folder of float32 safetensors, because peers read the very
same weights from processes of their own.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from msa_hf.modeling.errors import DataUnavailableError
from msa_hf.packages import cache_folder, qwen_coder_gguf, smollm2_gguf

logger = logging.getLogger(__name__)

PACKAGED = {"smollm2-135m": smollm2_gguf, "qwen2.5-coder-0.5b": qwen_coder_gguf}


def model_folder(name: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """Folder of a model: `name` itself if it is one, else that of a packaged model, made on first use.

    Raises DataUnavailableError if it is neither.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    if str(name) not in PACKAGED:
        raise DataUnavailableError(
            f"{name} is no folder of a model: give one, or one of {', '.join(PACKAGED)}"
        )
    folder = cache_folder(cache) / "models" / f"{name}-float32"
    if not folder.is_dir():
        _unpack(PACKAGED[str(name)](cache), folder)
    return folder


def load_causal_model(
    folder: str | os.PathLike,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, in evaluation mode, with Transformers' own attention."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _unpack(gguf: Path, folder: Path) -> None:
    logger.info("unpacking %s", gguf.name)
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpacked
        )
    except ImportError as error:
        raise DataUnavailableError("reading GGUF needs the gguf package: pip install gguf") from error
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as temporary:
        work = Path(temporary) / folder.name
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        os.replace(work, folder)
