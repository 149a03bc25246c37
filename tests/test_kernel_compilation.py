"""Kernels compiled for GPUs that are absent: no spills at the shipped parameters, tensor cores where due."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "kernels" / "benchmarks"

pytest.importorskip("triton", reason="triton is not installed")

# A product on tensor cores, the same sum without them, and one that no register file can hold.
PROGRAM = """
import json, sys
from dataclasses import asdict
import torch, triton, triton.language as tl
from compiled_kernels import compiling

@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, rows, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, rows, SIZE):
        place = (start + i)[:, None] * SIZE + i[None, :]
        total = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place), total)
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], total)

@triton.jit
def sum_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(a_ptr + i).to(tl.float32))

ours = torch.zeros(1024, 64, dtype=torch.bfloat16)
large = torch.zeros(1024, 128, dtype=torch.bfloat16)
out = torch.full((256, 256), 7.0)
with compiling(sys.argv[1]) as found:
    product_kernel[(1,)](ours, ours, out, 1024, 64)
    product_kernel[(1,)](ours, ours, out, 1024, 64)
    product_kernel[(1,)](ours, ours[0, 1:], out, 1, 64)
    sum_kernel[(1,)](ours, out, 64)
    product_kernel[(1,)](large, large, out, 1024, 128, num_warps=1)
assert (out == 7).all()
print(json.dumps([asdict(code) for code in found]))
"""


def run(*command, **extra):
    """A Python process that compiles kernels, with no compiled ones at hand."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | extra
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("target, instruction", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")])
def test_machine_code_is_read(tmp_path, target, instruction):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(tmp_path / "program.py", target, PYTHONPATH=str(BENCHMARKS), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    product, other, plain, large = json.loads(done.stdout)
    assert [code["kernel"] for code in (product, other, plain, large)] == [
        *["product_kernel"] * 2,
        "sum_kernel",
        "product_kernel",
    ]
    assert product["digest"] != other["digest"]  # unaligned pointers and rows = 1 are specialised
    assert all(name.startswith(instruction) for name in product["tensor_cores"]) and product["tensor_cores"]
    assert not plain["tensor_cores"]
    assert product["spills"] == plain["spills"] == 0 < large["spills"]
    assert 0 < plain["registers"] < product["registers"] < large["registers"]
    assert product["shared"] > plain["shared"] == 0
    assert product["constants"] == {"SIZE": 64}
    if target != "gfx942":
        assert 0 < product["loop"] < product["instructions"]
        assert plain["loop"] == 0


def test_shipped_parameters(tmp_path):
    """Every operator once for sm_80 and sm_90; the command fails on spills and on products without tensor
    cores."""
    command = (BENCHMARKS / "compile_ahead.py", "--quick", "--json", "--targets", "sm_80", "sm_90")
    done = run(*command, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    from msa_hf import kernels

    assert {row["operator"] for row in rows} == set(kernels.available)


def test_interpreting_process_is_refused(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(tmp_path / "program.py", "sm_90", PYTHONPATH=str(BENCHMARKS), TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET" in done.stderr
