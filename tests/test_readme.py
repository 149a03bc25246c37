"""The README's commands and Python code, run in their order as they stand there, with the real SmolLM2."""

import ast
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from code_blocks import ROOT, Block, blocks_of, environment_of, paste, run
from hub_server import HubServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = "the Python blocks"
HANG = 120  # seconds; nothing here waits that long

# Commands that are not run here: why.
ELSEWHERE = {
    "make demo": "three minutes; test_demo.py runs its script",
    "make test": "it runs this",
}
# Commands that are run with other words: the words, and why.
SUBSTITUTES = {
    "msa-hf eval retrieval ./smol-msa --questions 30 --memory-questions 30": (
        "msa-hf eval retrieval ./smol-msa --questions 2 --memory-questions 2",
        "a minute for 300 paragraphs",
    ),
    "msa-hf train-router ./smol-msa hotpotqa --limit 100 --steps 30 --out ./routers": (
        "msa-hf train-router ./smol-msa hotpotqa --limit 4 --steps 3 --out ./routers",
        "minutes for 1,000 paragraphs",
    ),
    "msa-hf serve ./smol-msa --store ./notes --token-file tokens.txt": (
        "msa-hf serve ./smol-msa --store ./notes --token-file tokens.txt --port 0 --json",
        "the usual port may be taken",
    ),
    "msa-hf space ./smol-msa": ("msa-hf space ./smol-msa --port 0 --json", "the usual port may be taken"),
}
# Commands that serve until they are ended: a path that they answer.
SERVERS = {"serve": "/health", "space": "/"}
# Indented blocks that are no commands, by how they begin.
NO_COMMANDS = {"modeling/    the model": "the tree of folders, see test_folders_of_the_tree_exist"}


def command_of(line: str) -> str:
    """The words of a line, without the comment."""
    return shlex.join(shlex.split(line, comments=True))


def steps_of(markdown: str) -> list[str]:
    """What to run, in order: each command, and once, where the first of them stands, all Python blocks.

    Raises:
        ValueError: a block that is neither Python nor commands, and not in NO_COMMANDS.
    """
    steps = []
    for block in blocks_of(markdown):
        if block.language == "python":
            steps += [PYTHON] if PYTHON not in steps else []
        elif block.language is None and all(map(is_command, block.text.splitlines())):
            steps += [command_of(line) for line in block.text.splitlines() if line]
        elif not (block.language is None and block.text.startswith(tuple(NO_COMMANDS))):
            raise ValueError(f"nothing here runs this block: {block}")
    return steps


def is_command(line: str) -> bool:
    return not line or line.split()[0] in ("msa-hf", "make")


def python_blocks() -> list[str]:
    return [block.text for block in blocks_of(README) if block.language == "python"]


STEPS = steps_of(README)


class Reader:
    """Someone who does what the README says, line by line, in one folder; a line is run once."""

    def __init__(self, folder: Path, hub: HubServer):
        self.folder, self.hub = folder / "here", hub
        self.printed: dict[str, str] = {}
        self.failure: BaseException | None = None
        self.folder.mkdir()
        self._write_what_the_commands_read()
        self.variables = hub.environment(folder / "home")
        # The command as it was installed beside Python, else the same from this checkout.
        self.msa_hf = Path(sys.executable).with_name("msa-hf")
        if not self.msa_hf.exists():
            self.msa_hf = folder / "msa-hf"
            self.msa_hf.write_text(
                f"#!{sys.executable}\nimport sys\nfrom msa_hf.cli import main\nsys.exit(main())\n"
            )
            self.msa_hf.chmod(0o755)

    def _write_what_the_commands_read(self):
        """Fewer of the same texts, because all of them take minutes to encode."""
        shutil.copy(ROOT / "ARCHITECTURE.md", self.folder)
        (self.folder / "LOG.md").write_text((ROOT / "LOG.md").read_text(encoding="utf-8")[:2000])
        (self.folder / "modeling").mkdir()
        for name in ("errors.py", "memory_files.py"):
            shutil.copy(ROOT / "modeling" / name, self.folder / "modeling")
        (self.folder / "tokens.txt").write_text("a-token-of-some-length-0123456789\n")
        (self.folder / "tokens.txt").chmod(0o600)

    def environment(self, command: str) -> dict[str, str]:
        """The Hub is there for what needs it, and nothing else may ask it."""
        environment = environment_of(**self.variables)
        environment.pop("TRITON_INTERPRET", None)
        if not command.startswith("msa-hf push"):
            environment["HF_HUB_OFFLINE"] = "1"
        return environment

    def output(self, step: str) -> str:
        """What a step of STEPS printed, after all that stand before it."""
        for earlier in STEPS[: STEPS.index(step) + 1]:
            if self.failure is not None:
                raise AssertionError("a line before this one failed") from self.failure
            if earlier not in self.printed and earlier not in ELSEWHERE:
                try:
                    self.printed[earlier] = self._run(earlier)
                except BaseException as error:
                    self.failure = error
                    raise
        return self.printed[step]

    def _run(self, step: str) -> str:
        if step == PYTHON:
            code = "\nprint('\\f')\n".join(python_blocks())
            return paste(code, self.folder, self.environment(step))
        return self.again(SUBSTITUTES.get(step, (step,))[0])

    def again(self, command: str) -> str:
        words = [str(self.msa_hf), *shlex.split(command)[1:]]
        if words[1] in SERVERS:
            return self._serve(words, SERVERS[words[1]])
        return run(words, self.folder, self.environment(command))

    def _serve(self, words: list[str], path: str) -> str:
        """What is answered at a path, once the server runs; it ends by SIGTERM."""
        running = subprocess.Popen(
            words, cwd=self.folder, env=self.environment("serve"), stdout=subprocess.PIPE, text=True
        )
        try:
            url = json.loads(running.stdout.readline())["url"]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{url.rstrip('/')}{path}", timeout=HANG) as answer:
                content = answer.read().decode()
            running.send_signal(signal.SIGTERM)
            assert running.wait(HANG) == 0
            return content
        finally:
            running.kill()
            running.wait(HANG)
            running.stdout.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    with HubServer(folder / "hub") as hub:
        hub.tokens = {"writer": ("USER", True)}
        yield Reader(folder, hub)


def the(beginning: str) -> str:
    """The one step that begins so."""
    [step] = [step for step in STEPS if step.startswith(beginning)]
    return step


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ELSEWHERE])
def test_it_runs(reader, step):
    assert reader.output(step)


def test_lists_name_lines_of_the_readme_and_change_only_numbers():
    assert len(set(STEPS)) == len(STEPS)
    assert {*ELSEWHERE, *SUBSTITUTES} <= set(STEPS)
    for line, (substitute, _) in SUBSTITUTES.items():
        assert substitute != line and re.sub(r"\d+", "N", substitute).startswith(re.sub(r"\d+", "N", line))
    for beginning in NO_COMMANDS:
        assert len([block for block in blocks_of(README) if block.text.startswith(beginning)]) == 1


def test_a_block_that_nothing_runs_is_noticed():
    assert steps_of(README + "\n    msa-hf list ./notes  # all\n") == [*STEPS, "msa-hf list ./notes"]
    for block in ("    rm -rf /\n", "```bash\nmsa-hf list ./notes\n```\n", "~~~\nmsa-hf list ./notes\n~~~\n"):
        with pytest.raises(ValueError, match="nothing here runs"):
            steps_of(f"{README}\n{block}")
    assert steps_of("```python\na = 1\n```\n\n- a list\n\n  ```python\n  a = 2\n  ```\n") == [PYTHON]
    assert blocks_of("- a list\n\n  ```python\n  a = 2\n  ```\n") == [Block("python", "a = 2\n")]


def test_answers_of_the_commands(reader):
    asked = reader.output(the("msa-hf ask ./library"))
    assert "memory.json" in asked.lower() and "modeling/memory_files.py" in asked
    assert "third flower pot" in reader.output(the("msa-hf ask ./notes")).split("[1]")[0]
    assert "key" in reader.output(the("msa-hf search ./notes")).splitlines()[0].split()
    for suite in ("routers", "BM25", "MiniLM-L6"):
        assert suite in reader.output(the("msa-hf eval retrieval"))


def test_ingesting_again_encodes_only_what_changed(reader):
    ingest = the("msa-hf ingest ./smol-msa ARCHITECTURE.md modeling --store")
    assert "again: only what changed is encoded" in README
    assert re.search(r"[1-9]\d* added, 0 updated, 0 deleted, 0 as they were", reader.output(ingest))
    reader.output(the("msa-hf serve"))  # what the lines between tell is of the first time
    path = reader.folder / "modeling" / "errors.py"
    path.write_text(path.read_text() + "\n# One line more.\n")
    assert re.search(r" 0 added, [1-9] updated, 0 deleted, [1-9]\d* as they were", reader.again(ingest))


def test_what_is_forgotten_is_found_no_more(reader):
    reader.output(the("msa-hf forget ./notes key"))
    assert "flower pot" not in reader.again("msa-hf search ./notes 'spare key' --mode lexical")


def test_python_prints_what_its_comments_say(reader):
    first, store, cache, kernels = reader.output(PYTHON).split("\f\n")
    assert [text.split("\n")[0] for text in python_blocks()] == [
        "import torch",
        "from msa_hf import MemoryStore",
        "from msa_hf import TurboQuantCache",
        "from msa_hf.modeling import ops",
    ]
    assert "print(output.answers[0])  # Nile\n" in python_blocks()[0]
    answer, *documents = first.splitlines()
    assert answer == "Nile" and documents[0].split()[0] == "1", "the document of the Nile is the best"
    assert (reader.folder / "memory" / "memory.json").is_file()

    assert "# the Seine is back" in python_blocks()[1] and "# [] means" in python_blocks()[1]
    hits, verified = store.splitlines()
    assert [name for name, _ in ast.literal_eval(hits)] == ["nile", "seine"]
    assert verified == "[] 1"

    for word in ("key codes", "value codes", "key scales", "value scales", "window", "in bfloat16"):
        assert re.search(rf"^{word} +[\d,]+ bytes", cache, re.M), word
    assert (reader.folder / "nile-cache" / "cache.json").is_file()
    assert ast.literal_eval(kernels)[0] in ("triton", "torch")


def test_pushed_repositories(reader):
    reader.output(the("msa-hf push memory"))
    listed = reader.printed[the("msa-hf push model ./smol-msa USER/smol-msa --dry-run")]
    assert "model.safetensors" in listed and "# The name" in listed
    model = reader.hub.repository("USER/smol-msa")
    memory = reader.hub.repository("USER/notes", "dataset")
    assert model.private and memory.private
    weights = reader.hub.files("USER/smol-msa")["model.safetensors"]
    assert weights == (reader.folder / "smol-msa" / "model.safetensors").read_bytes()
    assert "USER/smol-msa" in reader.hub.files("USER/notes", "dataset")["README.md"].decode()


def test_a_dry_run_contacts_nothing(reader):
    reader.output(the("msa-hf serve"))
    before = len(reader.hub.requests)
    reader.again(the("msa-hf push model ./smol-msa USER/smol-msa --dry-run"))
    assert len(reader.hub.requests) == before


def test_server_says_that_it_is_well(reader):
    assert json.loads(reader.output(the("msa-hf serve")))["status"] == "ok"


def test_folders_of_the_tree_exist():
    [tree] = [block.text for block in blocks_of(README) if block.text.startswith(tuple(NO_COMMANDS))]
    folders = re.findall(r"(?:^|\s{2,})(\w+)/\s", tree, re.M)
    assert {"modeling", "msa_hf", "configs", "kernels", "scripts", "space_app", "tests"} <= set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)
