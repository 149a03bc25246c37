"""The common model tests of Transformers, from its source archive on the package index.

The wheel has no tests. The archive has the modules test_*.py at the top of tests/, among them the common
tests of models, configurations and training, but no folder below tests/ and no module of another name. So no
release on the index has three modules that the common tests import: generation/test_utils.py, which is
GenerationTesterMixin, exporters/test_export.py and utils/test_configuration_utils.py. Something stands in for
them below. Nor does one have causal_lm_tester.py, or what the mixins of pipelines, tensor parallelism and
FSDP import (pipelines/ and distributed_testing_utils.py).
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

from msa_hf.modeling.errors import DataUnavailableError
from msa_hf.modeling.memory_files import file_sha256
from msa_hf.packages import cache_folder

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
PACKAGE = "transformers_tests"
MODULES = ("test_modeling_common", "test_configuration_common", "test_training_mixin")
MARKERS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"),
    *("is_training_test", "slow"),
)

# What every configuration takes and must keep: the fields of PreTrainedConfig, none at its default.
CONFIG_ARGUMENTS = {
    "architectures": ["SomeModel"],
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
STANDING_IN = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_ARGUMENTS},
}


def fetch_sdist(cache: str | os.PathLike | None = None) -> Path:
    """Path of the archive, fetched by pip if it is not in the cache; pip checks its hash before it reads it.

    Raises:
        DataUnavailableError: pip cannot fetch it, or the index has another file.
    """
    folder = cache_folder(cache)
    archive = folder / f"transformers-{VERSION}.tar.gz"
    if archive.is_file() and file_sha256(archive) == SHA256:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text(f"transformers=={VERSION} --hash=sha256:{SHA256}\n")
        # Without isolation pip reads the metadata by the setuptools that is here and fetches no other.
        options = ["--no-deps", "--no-binary=transformers", "--no-build-isolation", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options]
        done = subprocess.run(
            [*command, "--dest", temporary, "-r", str(wanted)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
            raise DataUnavailableError(
                f"{archive.name} could not be fetched ({reason}); place it at {archive}"
            )
        os.replace(Path(temporary) / archive.name, archive)
    return archive


def common_tests(folder: Path) -> dict[str, ModuleType]:
    """The modules of MODULES by name, unpacked into `folder` and imported from there."""
    place = folder / PACKAGE
    place.mkdir()
    (place / "__init__.py").touch()
    with tarfile.open(fetch_sdist()) as archive:
        for name in MODULES:
            source = archive.extractfile(f"transformers-{VERSION}/tests/{name}.py")
            (place / f"{name}.py").write_bytes(source.read())
    sys.path.insert(0, str(folder))
    try:
        for name, contents in STANDING_IN.items():
            package, _, module = name.partition(".")
            for whole in (f"{PACKAGE}.{package}", f"{PACKAGE}.{package}.{module}"):
                sys.modules[whole] = ModuleType(whole)
            vars(sys.modules[f"{PACKAGE}.{name}"]).update(contents)
        return {name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES}
    finally:
        sys.path.remove(str(folder))
