"""One operator from every place that kernels are loaded from: package, Hub layout, file of remote code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed")

from kernel_cases import DEVICE, poisoned
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from msa_hf import kernel_export, kernels

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))

from operands import Attention, attention_calls  # noqa: E402

HUB_LIBRARY = "kernels==0.17.2"

# Runs decode_attention of every source that it is given and writes what comes out.
PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

def package(path):
    import msa_hf.kernels
    return msa_hf.kernels, msa_hf.kernels.registration.NAMESPACE

def file(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.NAMESPACE

def hub(path):
    from kernels import get_local_kernel
    module = get_local_kernel(Path(path))
    return module, sys.modules[module.__name__ + ".registration"].NAMESPACE

folder = Path(sys.argv[1])
if "package" not in sys.argv:
    sys.modules["msa_hf"] = None  # an import of it fails
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tensors = {name: tensor.to(device) for name, tensor in load_file(folder / "arguments.safetensors").items()}
others = json.loads((folder / "arguments.json").read_text())
results, namespaces = {}, []
for i, (kind, path) in enumerate(zip(sys.argv[2::2], sys.argv[3::2])):
    module, namespace = {"package": package, "file": file, "hub": hub}[kind](path)
    namespaces.append(namespace)
    assert "decode_attention" in module.available
    out = torch.full_like(tensors["out"], torch.nan)
    module.decode_attention(**tensors | others | {"out": out})
    assert hasattr(getattr(torch.ops, namespace), "decode_attention")
    results[str(i)] = out.cpu()
assert len(set(namespaces)) == len(namespaces), namespaces
save_file(results, folder / "results.safetensors")
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Folder with the arguments of a call of decode_attention, and what msa_hf.kernels makes of them."""
    shape = Attention(heads=2, groups=1, packed=96, dim=64, recent=17, exact=2, mean_group=32, bits=((3, 2),))
    query = shape.query(DEVICE)
    out = torch.empty(1, 1, 2, 64, dtype=query.dtype, device=DEVICE)
    [call] = attention_calls(shape.view(DEVICE), query, out)
    with poisoned():
        kernels.decode_attention(**call)
    assert out.isfinite().all()
    folder = tmp_path_factory.mktemp("arguments")
    tensors = {name: value.contiguous() for name, value in call.items() if torch.is_tensor(value)}
    save_file(tensors, folder / "arguments.safetensors")
    others = {name: value for name, value in call.items() if not torch.is_tensor(value)}
    (folder / "arguments.json").write_text(json.dumps(others))
    return folder, out.cpu()


@pytest.fixture(scope="module")
def hub_library(tmp_path_factory):
    """A folder with Hugging Face's `kernels`; Transformers must not see it, so it is not installed."""
    folder = tmp_path_factory.mktemp("hub_library")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", folder, HUB_LIBRARY, "tomlkit"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot fetch {HUB_LIBRARY}: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def amalgam(tmp_path):
    path = tmp_path / "remote code" / "triton_ops.py"
    path.parent.mkdir()
    path.write_text(kernel_export.amalgamate())
    return path


def run(arguments, *sources, path=()):
    """Results of every source in one process."""
    folder, _ = arguments
    (folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, folder / "program.py", folder, *sources]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [result for _, result in sorted(load_file(folder / "results.safetensors").items())]


def test_one_file_runs_without_the_package(arguments, amalgam):
    [result] = run(arguments, "file", amalgam)
    assert torch.equal(result, arguments[1])


def test_hub_layout_loads_alone(arguments, hub_library, tmp_path):
    kernel_export.export_kernels(tmp_path)
    [result] = run(arguments, "hub", tmp_path, path=[hub_library])
    assert torch.equal(result, arguments[1])


def test_copies_share_a_process(arguments, amalgam, tmp_path):
    other = tmp_path / "other_ops.py"
    other.write_text(amalgam.read_text())
    results = run(arguments, "package", "", "file", amalgam, "file", other, path=[ROOT])
    assert len(results) == 3
    assert all(torch.equal(result, arguments[1]) for result in results)


REMOTE_CODE = """
import sys, torch
sys.modules["msa_hf"] = None
from remote_model import ops
from remote_model.attention_turboquant import turboquant_attention
from remote_model.cache_settings import CacheSettings
from remote_model.layer_turboquant import TurboQuantLayer

torch.manual_seed(0)
keys, values, query = torch.randn(3, 1, 2, 100, 64).to("cuda" if torch.cuda.is_available() else "cpu")
outputs = []
for choice in (True, False):
    ops.use_kernels(choice)
    assert (ops.backend(keys.device)[0] == "triton") == choice, ops.backend(keys.device)
    layer = TurboQuantLayer(CacheSettings(window=16, block=16, mean_group=32))
    layer.update(keys[:, :, :99], values[:, :, :99])
    handles = layer.update(keys[:, :, 99:], values[:, :, 99:])
    outputs.append(turboquant_attention(torch.nn.Module(), query[:, :, :1], *handles, None)[0])
assert torch.allclose(*outputs, atol=2e-2), (outputs[0] - outputs[1]).abs().max()
"""


def test_remote_code_has_kernels_without_msa_hf(amalgam, tmp_path):
    """The modeling files as they travel with a checkpoint, the one file of kernels among them."""
    folder = tmp_path / "remote_model"
    folder.mkdir()
    for source in (*(ROOT / "modeling").glob("*.py"), amalgam):
        (folder / source.name).write_text(source.read_text())
    (tmp_path / "program.py").write_text(REMOTE_CODE)
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_file_passes_the_check_of_remote_code(amalgam):
    """Transformers refuses files whose imports are missing, unless they are inside `try`."""
    assert f"available = {kernels.available!r}" in amalgam.read_text()
    assert "triton" not in get_imports(amalgam)
    assert get_relative_imports(amalgam) == []


def test_without_triton(amalgam):
    code = (
        "import sys, importlib.util; sys.modules['triton'] = None; import msa_hf.kernels as k; "
        "assert k.available == (); import msa_hf.modeling.ops\n"
        f"spec = importlib.util.spec_from_file_location('triton_ops', {str(amalgam)!r})\n"
        "try: spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "except ImportError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the kernels need triton" in done.stdout


def test_hub_layout(tmp_path):
    variant = kernel_export.export_kernels(tmp_path)
    assert variant == tmp_path / "build" / "torch-universal"
    sources = ROOT / "kernels" / "torch-ext" / "msa_kernels"
    names = {path.name for path in sources.glob("*.py")}
    assert {path.name for path in variant.iterdir()} == names | {"metadata.json"}
    assert all((variant / name).read_bytes() == (sources / name).read_bytes() for name in names)
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "msa-kernels" and metadata["id"].isidentifier()


FILES = {
    "__init__": '"""Package."""\nfrom .second import run\n\navailable = ("run",)\n',
    "first": '"""First."""\nimport math\nfrom functools import cache\n\nSIZE = 2  # why\n',
    "second": '"""Second."""\nimport math\n\nfrom .first import SIZE\n\n'
    "def run():\n    return math.pi * SIZE\n",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes a package of small files, some of them changed, and has it amalgamated."""

    def write(**changes):
        paths = []
        for name, text in (FILES | changes).items():
            paths.append(tmp_path / f"{name}.py")
            paths[-1].write_text(text)
        monkeypatch.setattr(kernel_export, "_sources", lambda: paths)
        return kernel_export.amalgamate()

    return write


def test_one_file_holds_what_the_package_holds(files, tmp_path):
    path = tmp_path / "flat.py"
    path.write_text(files())
    done = subprocess.run(
        [sys.executable, "-c", "import flat; print(flat.available, flat.run())"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.strip() == "('run',) 6.283185307179586"
    assert path.read_text().count("import math") == 1
    assert "SIZE = 2  # why" in path.read_text()


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"second": '"""Second."""\nfrom .first import SIZE\n\nif True:\n    SIZE = 3\n'},
            "`SIZE` of first and second",
        ),
        ({"second": '"""Second."""\nfrom operator import add as cache\n'}, "different names for `cache`"),
        ({"second": '"""Second."""\nimport math as SIZE\n'}, "different names for `SIZE`"),
        ({"first": '"""First."""\nfrom .second import run\n\nSIZE = 2\n'}, "import one another"),
        ({"second": '"""Second."""\nfrom .first import SIZE as run\n'}, "as they are"),
        ({"second": '"""Second."""\nfrom . import first\n'}, "from .file import name"),
        ({"second": '"""Second."""\n\n\ndef run():\n    from .first import SIZE\n'}, "below the top"),
    ],
)
def test_what_cannot_be_one_file_is_refused(files, changes, reason):
    with pytest.raises(ValueError, match=reason):
        files(**changes)
