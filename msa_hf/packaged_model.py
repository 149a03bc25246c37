"""The model that needs no choice: SmolLM2-135M with the shipped routers, converted once."""

import hashlib
from pathlib import Path

from . import packages
from .configs import preset, routers_folder

MODEL = "smollm2-135m"


def converted_model(folder: Path, cache: Path | None = None) -> Path:
    """Folder of the converted model with the routers that this package ships; made on first use."""
    import torch

    from . import __version__
    from .conversion import convert

    digest = hashlib.sha256(f"{__version__} {preset('models', MODEL)}".encode())
    routers = routers_folder(preset("models", MODEL)["routers"] or MODEL)
    for path in sorted(routers.glob("*.safetensors")) + sorted(routers.glob("*.json")):
        digest.update(path.read_bytes())
    target = folder / f"{MODEL}-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        packages.smollm2_gguf(cache)
        convert(MODEL, target, dtype=torch.float32)
    return target


def ready_model(path: str | None = None, device: str | None = None, dtype: str | None = None):
    """(model, tokenizer, its name for people) of a converted model, by default the one of this module."""
    from .model_loading import load_model

    name = MODEL if path is None else Path(path.rstrip("/")).name
    if path is None:
        # The demo's place, so that neither converts what the other has.
        path = str(converted_model(packages.cache_folder() / "demo"))
    return *load_model(path, device, dtype or faster_dtype()), name


def faster_dtype() -> str:
    """bfloat16 where this machine multiplies matrices faster in it than in float32; many CPUs do not."""
    import time

    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        left @ right
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        times[dtype] = time.perf_counter() - start
    return "bfloat16" if times[torch.bfloat16] < times[torch.float32] else "float32"
