"""The Hugging Face Hub: pushing models, routers, memories, kernels and the Space; fetching a memory.

A push is planned first: which files, with which card, checked before anything is sent. Sending it is one
commit on every branch that it goes to. What was uploaded before an interruption is not uploaded again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub import __version__ as hub_version
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card_facts import ADAPTER_FILE, TRAINING_FILE, TRAINING_LOG, CardError, hub_name, read_json
from .cards import REVISION, adapter_card, kernel_card, memory_card, model_card
from .hub_errors import HubError, HubMissingError, PushRefusedError, translated
from .kernel_export import VERSION, export_kernels
from .local_places import hide_places
from .outgoing import OutgoingFile, check_card, check_file, outgoing_files
from .space_export import PACKAGE, package_files
from .store.exchange import CODING, DOCUMENTS
from .store.exchange import INDEX as EXPORT_INDEX
from .training.adapter import FEATURES_FOLDER, SETTINGS_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from .store import MemoryStore

CARD = "README.md"
VECTORS = "vectors-[0-9][0-9][0-9][0-9][0-9].safetensors"
_MODEL_SUFFIXES = {".json", ".safetensors", ".py", ".jinja", ".txt", ".model", ".md", ".jsonl", ""}
_SPACE_SUFFIXES = {
    ".py",
    ".md",
    ".txt",
    ".json",
    ".jsonl",
    ".css",
    ".js",
    ".html",
    ".svg",
    ".png",
    ".jpg",
    "",
}
_SPACE_FILES = ("app.py", CARD, "requirements.txt")  # of a folder that is a package itself
_ADAPTER_FILES = (ADAPTER_FILE, WEIGHTS_FILE, SETTINGS_FILE, TRAINING_FILE, TRAINING_LOG)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Push:
    """What is to be sent.

    Args:
        kind: model, adapter, memory, kernels or space. repo_type: what the Hub calls it.
        branches: that get the commit; they are made where they are missing.
        replaces: patterns of files that belong to an earlier push where this one does not have them.
    """

    kind: str
    repository: str
    repo_type: str
    files: list[OutgoingFile]
    branches: tuple[str, ...] = (REVISION,)
    replaces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with translated(self.repository):
            validate_repo_id(self.repository)
        if self.repository.count("/") != 1:
            raise ValueError(f"{self.repository!r} is no name of a repository: give USER/NAME")
        for file in self.files:
            if file.path == CARD:
                check_card(self.card)

    @property
    def card(self) -> str:
        """The text of README.md."""
        content = next(file.content for file in self.files if file.path == CARD)
        return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """What would go, without contacting anything."""
        files = [{"path": own.path, "bytes": own.size, "lfs": own.lfs} for own in self.files]
        return {
            "kind": self.kind,
            "repository": self.repository,
            "repo_type": self.repo_type,
            "branches": list(self.branches),
            "files": files,
            "bytes": sum(own.size for own in self.files),
            "card": self.card,
        }


@dataclass(frozen=True)
class Pushed:
    """What became of a push: the page, and by branch the commit, which readers pin."""

    url: str
    commits: dict[str, str]


def plan_model(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Push:
    """A push of a folder that `convert` or `save_pretrained` wrote.

    Args:
        revision: the branch; by default the main one. base_model, license: see `cards.model_card`.

    Raises:
        PushRefusedError: a file must not leave this machine. CardError: this is no model of ours.
    """
    folder, revision = _folder(folder), revision or REVISION
    files = outgoing_files(folder, _MODEL_SUFFIXES, ignored=(CARD,))
    card = model_card(folder, repository, revision=revision, base_model=base_model, license=license)
    names = {file.path for file in files}
    if not names.intersection(_TOKENIZERS):
        raise PushRefusedError(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}): save it there first")
    code = read_json(folder / "config.json").get("auto_map") or {}
    missing = {f"{own.split('.')[0]}.py" for own in code.values()} - names
    if missing or "AutoModelForCausalLM" not in code:
        what = ", ".join(sorted(missing)) or "auto_map in config.json"
        raise PushRefusedError(f"{folder} lacks its code ({what}): convert or save_pretrained it again")
    return Push(
        "model",
        repository,
        "model",
        [*files, _card_file(card)],
        (revision,),
        ("*.safetensors", "*.safetensors.index.json"),
    )


def plan_adapter(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Push:
    """A push of a folder that train-router wrote; arguments and errors as of `plan_model`."""
    folder, revision = _folder(folder), revision or REVISION
    files = outgoing_files(folder, _MODEL_SUFFIXES, ignored=(CARD, FEATURES_FOLDER))
    if strange := sorted({file.path for file in files} - set(_ADAPTER_FILES)):
        raise PushRefusedError(f"{folder / strange[0]} belongs to no router adapter: move it elsewhere")
    card = adapter_card(folder, repository, revision=revision, base_model=base_model, license=license)
    settings = read_json(folder / ADAPTER_FILE)
    if settings.get("base_model_name_or_path") and not hub_name(settings["base_model_name_or_path"]):
        # A folder of this machine means nothing elsewhere, and tells more than anyone wants to know.
        settings["base_model_name_or_path"] = None
        data = (json.dumps(settings, indent=2) + "\n").encode()
        files = [OutgoingFile.of(ADAPTER_FILE, data) if own.path == ADAPTER_FILE else own for own in files]
    return Push("adapter", repository, "model", [*files, _card_file(card)], (revision,))


def plan_memory(
    store: MemoryStore,
    repository: str,
    scratch: str | Path,
    *,
    revision: str | None = None,
    namespaces: str | list[str] = "*",
    model: str | None = None,
    license: str | None = None,
    keep_paths: bool = False,
) -> Push:
    """A push of what a store has now.

    Args:
        scratch: folder for the export, empty or absent; it must last until the push is done.
        namespaces: that go; all by default. model: on the Hub, the one that reads the memory.
        license: of the documents. keep_paths: else, absolute paths of the files that documents came from
            become relative to the folder that they have in common.
    """
    scratch, revision = Path(scratch), revision or REVISION
    if not store.export_to(scratch, namespaces):
        raise PushRefusedError(f"{store.path} has no documents in these namespaces: there is nothing to push")
    if not keep_paths:
        hide_places(scratch)
    index = read_json(scratch / EXPORT_INDEX)
    index["model"] = model or hub_name(index["model"])
    (scratch / EXPORT_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    files = [check_file(scratch / name, name) for name in (EXPORT_INDEX, *index["files"])]
    card = memory_card(scratch, repository, revision=revision, model=index["model"], license=license)
    return Push("memory", repository, "dataset", [*files, _card_file(card)], (revision,), (VECTORS,))


def plan_kernels(repository: str, scratch: str | Path, *, revision: str | None = None) -> Push:
    """A push of the kernels of this package, in the layout that `kernels.get_kernel` loads.

    Args:
        scratch: folder for the export. revision: the branch; by default the main one and that of the
            version, where `get_kernel(..., version=)` looks.
    """
    branches = (revision,) if revision else (REVISION, f"v{VERSION}")
    variant = export_kernels(scratch)
    names = sorted(path.relative_to(scratch).as_posix() for path in variant.iterdir())
    files = [check_file(Path(scratch) / name, name) for name in names]
    card = kernel_card(variant, repository, revision=branches[-1])
    build = variant.relative_to(scratch).as_posix()
    return Push("kernels", repository, "kernel", [*files, _card_file(card)], branches, (f"{build}/*",))


def plan_space(folder: str | Path, repository: str, *, revision: str | None = None) -> Push:
    """A push of a Gradio Space: app.py, what it needs, and its own README.md with the Space's settings.

    An app.py that imports msa_hf gets this package beside it, as it is installed here. Of a folder that is a
    package itself, as space_app/ is, only app.py, README.md and requirements.txt go to the top.
    """
    folder = _folder(folder)
    for name in ("app.py", CARD):
        if not (folder / name).is_file():
            raise PushRefusedError(f"{folder} is no Space: it has no {name}")
    if not (folder / CARD).read_text(encoding="utf-8").startswith("---\n"):
        raise PushRefusedError(f"{folder / CARD} must begin with the Space's settings (sdk: gradio, ...)")
    code = (folder / "app.py").read_text(encoding="utf-8")
    if (folder / PACKAGE).exists() or not re.search(rf"^\s*(?:from|import)\s+{PACKAGE}\b", code, re.M):
        files = outgoing_files(folder, _SPACE_SUFFIXES)
        return Push("space", repository, "space", files, (revision or REVISION,))
    files = outgoing_files(folder, _SPACE_SUFFIXES)
    if (folder / "__init__.py").is_file():
        files = [file for file in files if file.path in _SPACE_FILES]
    return Push(
        "space", repository, "space", [*files, *package_files()], (revision or REVISION,), (f"{PACKAGE}/*",)
    )


def send(
    push: Push, *, private: bool = False, message: str | None = None, token: str | bool | None = None
) -> Pushed:
    """Creates the repository where it is missing, and commits the files.

    The same push again sends only what is not there yet, and makes no commit where nothing has changed.

    Args:
        private: of a repository that is made now; one that is there and public is refused.
        token: by default the one that huggingface_hub knows (`hf auth login`, HF_TOKEN).

    Raises HubError, see `hub_errors`: bad token, no right, no network, rate limit.
    """
    if push.repo_type not in getattr(constants, "REPO_TYPES_WITH_KERNEL", constants.REPO_TYPES):
        raise HubError(f"huggingface_hub {hub_version} knows no {push.repo_type} repositories: upgrade it")
    api = HfApi(token=token, library_name="msa_hf", library_version=__version__)
    message = message or f"msa-hf push {push.kind}"
    where: dict[str, Any] = {"repo_id": push.repository, "repo_type": push.repo_type}
    with translated(push.repository):
        space = {"space_sdk": "gradio"} if push.repo_type == "space" else {}
        url = api.create_repo(**where, private=private or None, exist_ok=True, **space)
        if private and not api.repo_info(**where).private:
            raise PushRefusedError(f"{push.repository} is there already and public: nothing was sent")
        commits = {}
        for branch in push.branches:
            if branch != REVISION:
                api.create_branch(**where, branch=branch, exist_ok=True)
            operations = [CommitOperationAdd(own.path, _source(own)) for own in push.files]
            operations += _deletions(push, api.list_repo_files(**where, revision=branch))
            done = api.create_commit(**where, operations=operations, commit_message=message, revision=branch)
            commits[branch] = done.oid
    return Pushed(str(url), commits)


def fetch_memory(repository: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Folder of a memory's files as they were pushed, in huggingface_hub's cache.

    Only the files of an export are fetched, and nothing in them is ever run.

    Raises HubMissingError for a repository without a memory, other HubErrors.
    """
    with translated(repository):
        found = snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            token=token,
            library_name="msa_hf",
            library_version=__version__,
            allow_patterns=[EXPORT_INDEX, DOCUMENTS, CODING, VECTORS],
        )
    if not (Path(found) / EXPORT_INDEX).is_file():
        raise HubMissingError(f"{repository} holds no memory: {EXPORT_INDEX} is missing")
    return Path(found)


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise CardError(f"{folder} is no folder")
    return folder


def _card_file(card: object) -> OutgoingFile:
    return OutgoingFile.of(CARD, str(card).encode())


def _source(file: OutgoingFile) -> str | bytes:
    return file.content if isinstance(file.content, bytes) else str(file.content)


def _deletions(push: Push, present: Iterable[str]) -> list[CommitOperationDelete]:
    """Shards of an earlier push that would be read with, or instead of, those of this one."""
    kept = {own.path for own in push.files}
    stale = [
        path for path in present if path not in kept and any(fnmatch(path, own) for own in push.replaces)
    ]
    return [CommitOperationDelete(path) for path in stale]
