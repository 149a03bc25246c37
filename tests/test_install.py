"""The packages, however they come: wheel, editable install and checkout offer the same names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
LOCAL = ["--no-deps", "--no-build-isolation", "--no-index"]

# Prints what an installation offers (names, files read through importlib.resources) and where it came from.
PROBE = """
import importlib.util, json
from pathlib import Path
import msa_hf, msa_hf.configs, msa_hf.evaluation, msa_hf.kernels, msa_hf.modeling, msa_hf.training
import msa_hf.space_app
exports = sorted(name for name in vars(msa_hf) if not name.startswith("_"))
offers = {"exports": exports, "version": msa_hf.__version__}
modules = [msa_hf, msa_hf.kernels, msa_hf.modeling, msa_hf.configs, msa_hf.training, msa_hf.evaluation]
modules.append(msa_hf.space_app)
for module in modules:
    folder = Path(module.__file__).parent
    found = folder.rglob("*.*") if module in (msa_hf.configs, msa_hf.space_app) else folder.glob("*.py")
    offers[module.__name__] = sorted(str(path.relative_to(folder)) for path in found if path.suffix != ".pyc")
folders = ("modeling", "configs", "kernels", "space_app", "tests")
top_level = [name for name in folders if importlib.util.find_spec(name)]
print(json.dumps([offers, [str(Path(module.__file__).resolve()) for module in modules], top_level]))
"""


def run(command, **kwargs):
    """Standard output of a command that must succeed; PYTHONPATH only as given."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= kwargs.pop("env", {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def probe(python, folder):
    return json.loads(run([python, "-c", PROBE], cwd=folder).splitlines()[-1])


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of what the packages are made of, so that building leaves nothing in the working tree."""
    target = tmp_path_factory.mktemp("source") / "project"
    target.mkdir()
    for name in ("msa_hf", "modeling", "configs", "kernels", "space_app"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def new_environment(folder):
    """Python of a new environment that sees the packages of this one, except msa_hf, without any download."""
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "msa_hf" not in entry.name and entry.name not in ("__pycache__", "kernels"):
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(str(borrowed))
    return python


@pytest.fixture
def python(tmp_path):
    return new_environment(tmp_path)


@pytest.fixture(scope="session")
def checkout(source, tmp_path_factory):
    """What the copy offers where it is not installed: [offers, origins, top-level names]."""
    return probe(new_environment(tmp_path_factory.mktemp("bare")), source)


def test_wheel_offers_what_the_checkout_offers(source, checkout, python, tmp_path):
    run([sys.executable, *PIP, "wheel", *LOCAL, "--wheel-dir", tmp_path / "wheels", source], cwd=tmp_path)
    run([python, *PIP, "install", *LOCAL, next((tmp_path / "wheels").glob("*.whl"))], cwd=tmp_path)
    offers, origins, top_level = probe(python, tmp_path)
    assert offers == checkout[0]
    assert top_level == []
    assert not [origin for origin in origins if origin.startswith(str(source.resolve()))]
    assert run([python.parent / "msa-hf", "--help"], cwd=tmp_path)


def test_editable_install_offers_what_the_checkout_offers(source, checkout, python, tmp_path):
    run([python, *PIP, "install", *LOCAL, "--editable", source], cwd=tmp_path)
    offers, origins, top_level = probe(python, tmp_path)
    assert offers == checkout[0]
    assert top_level == []
    assert origins == checkout[1]
    assert probe(python, source)[:2] == [offers, origins]
    # Run from another checkout, all of its packages come from there.
    assert all(Path(origin).is_relative_to(ROOT) for origin in probe(python, ROOT)[1])


def test_hugging_face_kernels_wins_over_our_folder(tmp_path):
    """From the project's root, `kernels` is no package of ours, and an installed one is found."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'hugging face'")
    (tmp_path / "who_owns_kernels.py").write_text("import kernels; print(kernels.owner)")
    for command in (["-c", "import kernels; print(kernels.owner)"], ["-m", "who_owns_kernels"]):
        owner = run([sys.executable, *command], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)})
        assert owner.strip() == "hugging face"
    find = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    assert str(ROOT) not in run([sys.executable, "-c", find], cwd=ROOT)
    run([sys.executable, "-c", "import transformers, transformers.modeling_utils"], cwd=ROOT)


def test_import_loads_nothing_of_the_outer_ring():
    """`import msa_hf` adds none of these to what importing Transformers' own model code loads."""
    heavy = {"peft", "gradio", "pypdf", "datasets", "accelerate", "gguf", "matplotlib"}
    base = "import sys, transformers.models.llama.modeling_llama, transformers.generation.utils"
    loaded = [
        set(run([sys.executable, "-c", f"{code}; print(' '.join(sys.modules))"], cwd=ROOT).split())
        for code in (base, f"{base}, msa_hf")
    ]
    assert not heavy & (loaded[1] - loaded[0])
