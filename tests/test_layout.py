"""The house, read from its source: what may import what, and what no file may contain."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "msa_hf.modeling": ROOT / "modeling",
    "msa_hf.configs": ROOT / "configs",
    "msa_hf.kernels": ROOT / "kernels" / "torch-ext" / "msa_kernels",
    "msa_hf": ROOT / "msa_hf",
    "scripts": ROOT / "scripts",
    "space_app": ROOT / "space_app",
}

# A file imports only from its own floor or a lower one (ARCHITECTURE.md).
MODELING_FLOORS = {
    "errors": 0,
    "checkpoint_code": 1,
    "configuration_msa": 1,
    "lexical": 1,
    "memory_files": 1,
    "bit_packing": 1,
    "codebooks": 1,
    "rotations": 1,
    "turboquant": 1,
    "turboquant_paper": 1,
    "code_products": 1,
    "code_products_compiled": 1,
    "growing_tensor": 1,
    "packed_heads": 1,
    "packed_states": 1,
    "packed_vectors": 1,
    "cache_settings": 1,
    "fitted_transforms": 1,
    "key_value_gradients": 1,
    "transform_fitting": 1,
    "bit_allocation": 1,
    "calibration_plan": 1,
    "coding_prices": 1,
    "entropy_coding": 1,
    "fingerprint_msa": 1,
    "kernel_attention": 1,
    "kernel_encoding": 1,
    "kernel_memory": 1,
    "routing_products": 1,
    "sample_texts": 1,
    "triton_ops": 1,
    "ops": 2,
    "memory_bank": 2,
    "layer_turboquant": 2,
    "attention_turboquant": 2,
    "cache_state": 2,
    "cache_files": 2,
    "cache_report": 2,
    "cache_turboquant": 2,
    "coding_effect": 2,
    "calibration_files": 2,
    "cache_calibration": 2,
    "cache_memory": 3,
}
MODELING_DEFAULT_FLOOR = 3
FLOORS = {
    "msa_hf.kernels": 0,
    "msa_hf.configs": 0,
    "msa_hf.modeling": 3,
    "msa_hf": 4,
    "scripts": 5,
    "space_app": 5,
}
MODELING_MAY_IMPORT = sys.stdlib_module_names | {
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "tqdm",
}
ONLY_INSIDE_FUNCTIONS = {
    "peft",
    "gradio",
    "pypdf",
    "datasets",
    "gguf",
    "accelerate",
    "matplotlib",
    "starlette",
    "uvicorn",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}


def modules():
    """(dotted name, path) of every module of the project outside the tests."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


MODULES = dict(modules())


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(name, path):
    """Dotted names that a module imports, relative ones resolved; [(imported, node)]."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (f"{full}.{alias.name}" if f"{full}.{alias.name}" in MODULES else full), node


def package_of(name):
    return next(
        (p for p in sorted(FLOORS, key=len, reverse=True) if name == p or name.startswith(p + ".")), None
    )


def floor(name):
    package = package_of(name)
    if package == "msa_hf.modeling" and name != package:
        return MODELING_FLOORS.get(name.removeprefix("msa_hf.modeling."), MODELING_DEFAULT_FLOOR)
    return None if package is None else FLOORS[package]


def test_every_module_imports_only_from_its_own_floor_or_lower():
    broken = []
    for name, path in MODULES.items():
        for imported, node in imports(name, path):
            if imported.split(".")[0] == "tests":
                broken.append(f"{name}:{node.lineno} imports the tests")
            elif (target := floor(imported)) is not None and target > floor(name):
                broken.append(
                    f"{name}:{node.lineno} (floor {floor(name)}) imports {imported} (floor {target})"
                )
    assert not broken, broken


def test_import_walk_sees_a_broken_floor(tmp_path):
    """The walk above must be able to fail: a bank that imports the model is caught."""
    path = tmp_path / "memory_bank.py"
    path.write_text("from .modeling_msa import MSAModel\n")
    [(imported, _)] = imports("msa_hf.modeling.memory_bank", path)
    assert floor(imported) > floor("msa_hf.modeling.memory_bank")


def test_modeling_files_within_a_floor_import_without_cycles():
    graph = {
        name: {i for i, _ in imports(name, path) if i in MODULES and i != "msa_hf.modeling"}
        for name, path in MODULES.items()
        if name.startswith("msa_hf.modeling.")
    }
    while graph:
        leaves = [name for name, needed in graph.items() if not needed & set(graph)]
        assert leaves, f"import cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_modeling_is_flat_and_imports_travel_with_a_checkpoint():
    """Remote code is found by text: only `from .x import y`; optional packages only inside try."""
    folder = PACKAGES["msa_hf.modeling"]
    assert not [path for path in folder.rglob("*.py") if path.parent != folder]
    for path in folder.glob("*.py"):
        parsed = tree(path)
        tried = {
            n for t in ast.walk(parsed) if isinstance(t, ast.Try) for part in t.body for n in ast.walk(part)
        }
        for node in ast.walk(parsed):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (
                    f"{where}: from .x import y"
                )
                assert (folder / f"{node.module}.py").is_file(), f"{where}: {node.module}.py is missing"
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and node not in tried:
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                strange = {name.split(".")[0] for name in names} - MODELING_MAY_IMPORT
                assert not strange, f"{where}: remote code may not have {strange}"


def test_kernels_import_only_torch_triton_and_themselves():
    for name, path in MODULES.items():
        if name.startswith("msa_hf.kernels"):
            for imported, node in imports(name, path):
                top = imported.split(".")[0]
                own = imported.startswith("msa_hf.kernels") and getattr(node, "level", 0) > 0
                assert own or top in {"torch", "triton"} or top in sys.stdlib_module_names, (name, imported)


def test_heavy_optional_packages_are_imported_inside_functions():
    for name, path in MODULES.items():
        for node in tree(path).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            heavy = {n.split(".")[0] for n in names} & ONLY_INSIDE_FUNCTIONS
            assert not heavy or name.startswith("space_app"), f"{name} imports {heavy} at the top"


def unsafe(node):
    """What is forbidden about one syntax node, or None."""
    if isinstance(node, ast.Import):
        found = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        return f"import of {sorted(found)}" if found else None
    if isinstance(node, ast.ImportFrom):
        return (
            f"import from {node.module}" if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else None
        )
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    if called in {
        "eval",
        "exec",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
    }:
        return f"call of {called}"
    if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
        return "numpy pickles"
    return None


def test_nothing_reads_pickles_or_runs_text():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {what}"
        for path in MODULES.values()
        for node in ast.walk(tree(path))
        if (what := unsafe(node))
    ]
    assert not found, found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p, os",
        "from marshal import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_walk_for_unsafe_code_sees(code):
    assert any(unsafe(node) for node in ast.walk(ast.parse(code)))
