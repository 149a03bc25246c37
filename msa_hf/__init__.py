"""Memory Sparse Attention (arXiv 2603.23516) for Transformers: a language model with a memory of documents.

Importing this package registers the model with AutoConfig, AutoModel and AutoModelForCausalLM, for its own
checkpoints ("memory_sparse_attention") and for those of the reference implementation ("msa").
"""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


class _CheckoutFinder:
    """Lets a checkout that was not installed import msa_hf.kernels, msa_hf.modeling, msa_hf.configs and
    msa_hf.space_app.

    setup.py maps these names to folders beside msa_hf/; an installed package never gets here. First in line,
    so that the packages of one checkout stay together where another checkout is installed editable.
    """

    root = Path(__file__).resolve().parent.parent
    folders = {
        "msa_hf.kernels": root / "kernels" / "torch-ext" / "msa_kernels",
        "msa_hf.modeling": root / "modeling",
        "msa_hf.configs": root / "configs",
        "msa_hf.space_app": root / "space_app",
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
    sys.meta_path.insert(0, _CheckoutFinder)

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from .configs import caches_folder  # noqa: E402
from .kernel_export import amalgamate  # noqa: E402
from .modeling.cache_turboquant import TurboQuantCache  # noqa: E402
from .modeling.calibration_files import (  # noqa: E402
    Calibration,
    register_calibrations,
    registered_calibrations,
)
from .modeling.checkpoint_code import register_calibration_source, register_kernel_source  # noqa: E402
from .modeling.configuration_msa import MSAConfig, MSAReferenceConfig  # noqa: E402
from .modeling.memory_bank import MemoryBank  # noqa: E402
from .modeling.modeling_msa import MSAForCausalLM, MSAModel  # noqa: E402
from .question_answering import register as register_pipeline  # noqa: E402
from .store import MemoryStore  # noqa: E402

__all__ = [
    "Calibration",
    "MSAConfig",
    "MSAForCausalLM",
    "MSAModel",
    "MemoryBank",
    "MemoryStore",
    "TurboQuantCache",
    "__version__",
]

register_calibrations(caches_folder())
register_pipeline()
AutoConfig.register(MSAConfig.model_type, MSAConfig, exist_ok=True)
# Its from_dict gives a plain MSAConfig, so the models need no second registration.
AutoConfig.register(MSAReferenceConfig.model_type, MSAReferenceConfig, exist_ok=True)
AutoModel.register(MSAConfig, MSAModel, exist_ok=True)
AutoModelForCausalLM.register(MSAConfig, MSAForCausalLM, exist_ok=True)
if hasattr(modeling_auto, "AutoModelForDecision"):  # newer releases; `transformers serve` asks it first
    modeling_auto.AutoModelForDecision.register(MSAConfig, MSAForCausalLM, exist_ok=True)
# save_pretrained then copies the modeling files into the checkpoint, for trust_remote_code=True elsewhere.
MSAConfig.register_for_auto_class()
MSAModel.register_for_auto_class("AutoModel")
MSAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
register_kernel_source(amalgamate)
register_calibration_source(registered_calibrations)
