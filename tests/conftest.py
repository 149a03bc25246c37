"""What several test modules share: a tiny tokenizer and the real SmolLM2."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import msa_hf
from msa_hf import packages
from msa_hf.conversion import convert

# Tiny tensors: threads cost more than they give, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte, after <pad> (0), <s> (1) and </s> (2); pads on the left, with a chat template."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as the preset converts it, in float32; cached between runs."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(msa_hf.__version__.encode())
    parts = ["modeling/configuration_msa.py", "modeling/modeling_msa.py", "msa_hf/conversion.py"]
    parts += ["msa_hf/weight_plan.py", "msa_hf/weight_streaming.py", "msa_hf/training/adapter_merging.py"]
    routers = [path for path in root.glob("configs/routers/*/*") if path.suffix in (".json", ".safetensors")]
    for path in sorted([*(root / part for part in parts), *root.glob("configs/models/*.json"), *routers]):
        digest.update(path.read_bytes())
    folder = packages.cache_folder() / "tests" / f"smollm2-{digest.hexdigest()[:12]}"
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder.parent}.lock"):  # tests run in several processes
        if not folder.is_dir():
            shutil.rmtree(folder.parent, ignore_errors=True)
            convert("smollm2-135m", folder, dtype=torch.float32)
    return folder
