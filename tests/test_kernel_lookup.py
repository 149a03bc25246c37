"""The PTX of the centroid lookup, run by a small interpreter of its eight instructions."""

import re

import numpy as np
import pytest
import torch
from kernel_cases import WIDTHS

from msa_hf.kernels.lookup import byte_tables, lookup_assembly
from msa_hf.modeling.codebooks import codebook


def run_ptx(assembly: str, inputs: list[int], outputs: int) -> list[int]:
    """Registers $0 ... of straight-line PTX over 32 bit integers, `inputs` following `outputs`."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def permute(a: int, b: int, selectors: int) -> int:
        data, result = (b << 32 | a).to_bytes(8, "little"), 0
        for i in range(4):
            selector = selectors >> (4 * i) & 15
            byte = data[selector & 7]
            result |= ((255 if byte & 128 else 0) if selector & 8 else byte) << (8 * i)
        return result

    def table(a: int, b: int, c: int, truth: int) -> int:
        bits = range(32)
        return sum((truth >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in bits)

    run = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b,
        "sub.u32": lambda a, b: a - b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "prmt.b32": permute,
        "lop3.b32": table,
    }
    for line in assembly.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        operation, target, *operands = re.split(r"[ ,]+", line.rstrip(";"))
        registers[target] = run[operation](*map(value, operands)) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def pair(word: int, dtype: torch.dtype) -> list[float]:
    return torch.frombuffer(bytearray(word.to_bytes(4, "little")), dtype=dtype).tolist()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_lookup_gives_the_centroids_of_the_codes(bits, dtype):
    table = codebook(128, bits)
    expected = table.to(dtype).tolist()
    tables = [word & 0xFFFFFFFF for word in byte_tables(tuple(table.tolist()), dtype) for _ in range(4)]
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, (300, 3), dtype=np.uint64).tolist()
    words += [[0, 0, 0], [0xFFFFFFFF] * 3]
    for row in words:
        data = [np.frombuffer(int(word).to_bytes(4, "little"), np.uint8) for word in row]
        if bits == 3:
            tiles = [(half, place) for half in range(2) for place in range(4)]
            codes = [(data[h] >> 2 * p & 3) | (data[2] >> (2 * p + h) & 1) << 2 for h, p in tiles]
        else:
            row = row[:1]
            codes = [data[0] >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
        results = run_ptx(lookup_assembly(bits), [*row, *tables], 2 * len(codes))
        for byte in range(4):
            read = [pair(results[4 * word + byte], dtype) for word in range(len(codes) // 2)]
            assert sum(read, []) == [expected[code[byte]] for code in codes]


def test_wide_codebooks_are_read_from_memory():
    assert lookup_assembly(5) == lookup_assembly(6) == ""
    assert torch.equal(codebook(64, 4), -codebook(64, 4).flip(0))  # what four bits rely on
