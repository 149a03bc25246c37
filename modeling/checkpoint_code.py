"""What lets a checkpoint stand alone: its code, which classes of it the Auto classes load, and the kernels.

Transformers copies the files of modeling/ beside the weights. Two things it does not do are done here, when
the configuration is written: it names only the class that is saved, and it copies the file that imports the
kernels from msa_hf, which would find nothing elsewhere.
"""

from collections.abc import Callable
from pathlib import Path

CODE = "modeling_msa.py"
KERNELS = "triton_ops.py"
AUTO_MAP = {
    "AutoConfig": "configuration_msa.MSAConfig",
    "AutoModel": "modeling_msa.MSAModel",
    "AutoModelForCausalLM": "modeling_msa.MSAForCausalLM",
    # A language model decides by the logits of its answers. This is also the only Auto class that
    # `transformers serve` asks; it finds no other class outside of Transformers.
    "AutoModelForDecision": "modeling_msa.MSAForCausalLM",
}
_kernels: dict[str, Callable[[], str] | None] = {"source": None}


def register_kernel_source(source: Callable[[], str]) -> None:
    """source(): the text of one file with all Triton kernels. Remote code has that file already, and copies
    it."""
    _kernels["source"] = source


def complete_code(folder: str | Path, auto_map: dict[str, str] | None) -> dict[str, str] | None:
    """Puts the kernels into a folder that holds the models' code, and returns its `auto_map`.

    Classes that are named already stay, except those of a repository that this one was loaded from.
    Elsewhere nothing happens.
    """
    folder = Path(folder)
    if not (folder / CODE).is_file():
        return auto_map
    if _kernels["source"] is not None:
        (folder / KERNELS).write_text(_kernels["source"](), encoding="utf-8")
    given = {name: own for name, own in (auto_map or {}).items() if name not in AUTO_MAP or "--" not in own}
    return {**AUTO_MAP, **given}
