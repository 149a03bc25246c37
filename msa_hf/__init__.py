"""Memory Sparse Attention for Transformers."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


class _CheckoutFinder:
    """Lets a checkout that was not installed import msa_hf.kernels, msa_hf.modeling and msa_hf.configs.

    setup.py maps these names to folders beside msa_hf/; an installed package never gets here.
    """

    root = Path(__file__).resolve().parent.parent
    folders = {
        "msa_hf.kernels": root / "kernels" / "torch-ext" / "msa_kernels",
        "msa_hf.modeling": root / "modeling",
        "msa_hf.configs": root / "configs",
    }

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folder = cls.folders.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (_CheckoutFinder.root / "setup.py").is_file() and _CheckoutFinder not in sys.meta_path:
    sys.meta_path.append(_CheckoutFinder)
