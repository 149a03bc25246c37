"""The kernels outside a pip installation: as a Hub kernel, and as one file beside remote code.

Both hold the same source as `msa_hf.kernels`. Each copy that a process loads registers operators in a
namespace of its own (`msa_hf.kernels.registration`), so copies do not disturb one another.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "msa-kernels"
VERSION = 1
LICENSE = "Apache-2.0"

_HEADER = '''\
"""Triton kernels of msa_hf in one file, beside remote code: written by `msa_hf.kernel_export.amalgamate`.

Raises ImportError without triton. `available` names the operators.
"""
'''
# Transformers refuses remote code whose imports are not installed, except for those inside `try`.
_TRITON = """\
try:
    {imports}
except ImportError as error:
    raise ImportError(f"the kernels need triton: {{error}}") from error
"""


def export_kernels(folder: str | Path) -> Path:
    """Writes the layout that Hugging Face's `kernels.get_local_kernel(folder)` and the Hub read.

    Returns:
        The folder of the only variant, build/torch-universal: sources and metadata.json.
    """
    variant = Path(folder) / "build" / "torch-universal"
    variant.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
        (variant / path.name).write_bytes(path.read_bytes())
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{digest.hexdigest()[:12]}",  # the module is imported by this name
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return variant


def amalgamate() -> str:
    """Source of one flat module with the operators of all files, `available`, and all of it as `kernels`.

    Triton reads the source of kernels, so it must lie in a file before it is imported.

    Raises:
        ValueError: two files define one name, import it from different places or import one another in a
            way that has no flat counterpart.
    """
    modules = {path.stem: _Module.read(path) for path in _sources()}
    package = modules.pop("__init__")
    ordered = _ordered(modules)
    _check_names(ordered)
    imports = {"import types", *(line for module in ordered for line in module.imports)}
    triton = sorted(line for line in imports if line.split()[1].split(".")[0] == "triton")
    parts = [_HEADER, "\n".join(sorted(imports - set(triton))) + "\n"]
    if triton:
        parts.append(_TRITON.format(imports="\n    ".join(triton)))
    parts += [f"# {module.name}.py: {module.summary}\n\n{module.body}" for module in ordered]
    parts.append(f"available = {package.available!r}\nkernels = types.SimpleNamespace(**globals())\n")
    return "\n\n".join(parts)


def _sources() -> list[Path]:
    package = importlib.util.find_spec("msa_hf.kernels")
    return sorted(Path(package.origin).parent.glob("*.py"))


@dataclass
class _Module:
    """One file of the package.

    Args:
        imports: statements that import from elsewhere. siblings: the names that it takes from other files.
        names: what it defines at the top. body: its source without docstring and imports.
        available: the operators that it names.
    """

    name: str
    summary: str
    imports: list[str]
    siblings: dict[str, list[str]]
    names: list[str]
    body: str
    available: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> _Module:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        imports, siblings, removed = [], {}, tree.body[:1]  # the docstring, which every file has
        for node in tree.body if path.stem != "__init__" else ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                _check_sibling(node, path.stem)
                siblings[node.module] = [alias.name for alias in node.names]
                removed.append(node)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                imports += _statements(node)
                removed.append(node)
        if path.stem != "__init__":
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level and node not in removed:
                    raise ValueError(f"{path.name}:{node.lineno} imports a sibling below the top of the file")
        lines = source.splitlines()
        for node in removed:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        summary = ast.get_docstring(tree).splitlines()[0]
        names = [name for node in tree.body for name in _defined(node)]
        body = "\n".join(lines).strip() + "\n"
        return cls(path.stem, summary, imports, siblings, names, body, _available(tree))


def _check_sibling(node: ast.ImportFrom, where: str) -> None:
    if node.level != 1 or node.module is None or "." in node.module:
        raise ValueError(f"{where}.py:{node.lineno} must import siblings as `from .file import name`")
    if any(alias.asname or alias.name == "*" for alias in node.names):
        raise ValueError(f"{where}.py:{node.lineno} must import names of siblings as they are")


def _statements(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """One statement for each name, so that equal ones of several files are seen as equal."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield ast.unparse(ast.Import([alias]))
        else:
            yield ast.unparse(ast.ImportFrom(node.module, [alias], 0))


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.If, ast.Try, ast.With)):
        for inner in ast.iter_child_nodes(node):
            yield from _defined(inner)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _available(tree: ast.Module) -> tuple[str, ...]:
    """The value that the last statement `available = (...)` gives it."""
    found: tuple[str, ...] = ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "available":
            found = ast.literal_eval(node.value)
    return found


def _ordered(modules: dict[str, _Module]) -> list[_Module]:
    """Every file behind those that it imports from."""
    waiting, ordered = dict(modules), []
    while waiting:
        ready = [name for name, module in waiting.items() if not set(module.siblings) & set(waiting)]
        if not ready:
            raise ValueError(f"these files of the kernels import one another: {', '.join(waiting)}")
        ordered += [waiting.pop(name) for name in ready]
    return ordered


def _check_names(modules: list[_Module]) -> None:
    owners: dict[str, str] = {}
    claims = [(name, module.name, module.name) for module in modules for name in module.names]
    for module in modules:
        for line in module.imports:
            claims.append((line.split()[-1].split(".")[0], line, module.name))
    for name, origin, where in claims:
        if owners.setdefault(name, origin) != origin:
            raise ValueError(
                f"the kernels need different names for `{name}` of {owners[name]} and {origin} ({where}.py)"
            )
