"""The package alone, against closed forms: what a kernel-builder project can check without msa_hf."""

import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))

import msa_kernels  # noqa: E402

TOLERANCE = 1e-5 if DEVICE.type == "cpu" else 6e-3


def test_one_bit_keys_and_values():
    """Codes of 1 bit are signs: attention on them is attention on the vectors that they stand for."""
    generator = torch.Generator().manual_seed(0)
    packed, recent, dim = 130, 7, 64
    bits = torch.randint(0, 2, (2, 1, 1, packed, dim), generator=generator, dtype=torch.uint8)
    # Byte i of dim / 8 holds channels i, i + dim / 8, ..., from its low bit upwards.
    planes = bits.unflatten(-1, (8, dim // 8))
    codes = (planes << torch.arange(8, dtype=torch.uint8)[:, None]).sum(-2, dtype=torch.uint8).to(DEVICE)
    scales = (0.5 + torch.rand(2, 1, 1, packed, 1, generator=generator)).bfloat16().to(DEVICE)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q.to(DEVICE)
    keys, values = scales.float() * (2.0 * bits.to(DEVICE) - 1) @ rotation
    dense = torch.randn(2, 1, 1, recent, dim, generator=generator).to(DEVICE)
    query = torch.randn(1, 4, 1, dim, generator=generator).to(DEVICE)
    heads = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    coded = [(codes[i], scales[i], (-1.0, 1.0), rotation.contiguous(), None) for i in range(2)]
    out = torch.full((1, 1, 4, dim), torch.nan, device=DEVICE)
    msa_kernels.decode_attention(
        out, query, heads, *coded[0], *coded[1], None, None, 0, None, None, None, dense[0], dense[1], None,
        dim**-0.5, 0.0, 0,
    )  # fmt: skip
    states = [torch.cat(pair, dim=2).expand(1, 4, -1, -1) for pair in ((keys, dense[0]), (values, dense[1]))]
    oracle = torch.nn.functional.scaled_dot_product_attention(query, *states).transpose(1, 2)
    assert (out - oracle).norm() < TOLERANCE * oracle.norm()


def test_the_best_documents_of_chunks():
    keys = torch.eye(16, device=DEVICE)
    question = keys[None, [3, 7]]
    mask = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    offsets = torch.tensor([0, 4, 4, 16], device=DEVICE)
    scores = msa_kernels.document_maxima(msa_kernels.route_scores(question, mask, keys), offsets)
    values, documents = msa_kernels.top_documents(scores, 4)
    assert documents.tolist() == [[0, 2, 1, -1]] and values[0, :2].tolist() == [1.0, 1.0]


def test_means_of_chunks():
    states = torch.arange(20.0, device=DEVICE).view(2, 5, 2)
    [means] = msa_kernels.pool_chunks([states], torch.tensor([5, 3], device=DEVICE), [2], [5])
    assert means.tolist() == [[1, 2], [5, 6], [8, 9], [11, 12], [14, 15]]
