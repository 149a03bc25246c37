"""A Python with torch, Transformers, safetensors and what these need, and nothing else of what is here."""

import json
import os
import subprocess
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("torch", "transformers", "safetensors")
ABSENT = {"triton"}  # what torch asks for on some platforms and models must do without


def needed(roots: tuple[str, ...]) -> dict[str, Distribution]:
    """The named distributions and what their metadata requires, as far as it is installed here."""
    found, waiting = {}, [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in ABSENT - set(roots) or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        if name not in found:
            found[name] = distribution(name)
            waiting += [Requirement(line) for line in found[name].requires or ()]
    return found


class BareEnvironment:
    """`python` of a new environment in `folder`, where only `roots` and what they need can be imported."""

    def __init__(self, folder: Path, roots: tuple[str, ...] = ROOTS):
        self.folder = folder
        self.distributions = needed(roots)
        venv.create(folder / "environment", with_pip=False)
        self.python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
        packages = folder / "packages"
        packages.mkdir(parents=True)
        for own in self.distributions.values():
            for top in {file.parts[0] for file in own.files} - {"..", "__pycache__"}:
                (packages / top).symlink_to(own.locate_file(top))
        site = self._run(["-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        Path(site, "packages.pth").write_text(str(packages))

    def run(self, program: Path | str, *arguments: object) -> object:
        """What a program, a file or its text, prints as its last line in JSON. It runs offline."""
        if isinstance(program, str):
            (self.folder / "program.py").write_text(program)
            program = self.folder / "program.py"
        return json.loads(self._run(["-I", program, *map(str, arguments)]).splitlines()[-1])

    def start(self, *words: object, **options: object) -> subprocess.Popen:
        """A process of this Python."""
        keep = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
        environment = keep | {
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PATH": "",
        }
        command = [self.python, *map(str, words)]
        return subprocess.Popen(
            command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, text=True, **options
        )

    def _run(self, words: list) -> str:
        with self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        return out
