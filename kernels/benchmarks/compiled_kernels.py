"""What Triton makes of a launch for a GPU that is absent: registers, spills, tensor-core instructions.

Within `compiling(target)` a launch compiles its kernel for the target, specialised on its arguments as at
run time, and runs nothing; the operators are called with tensors on the CPU. Needs a process that does not
interpret kernels (TRITON_INTERPRET unset).
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(nvidia.__file__).parent / "bin"
TENSOR_CORES = re.compile(r"(?:HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|v_mfma|v_smfmac)")
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass
class MachineCode:
    """One kernel, compiled.

    Args:
        digest: of source, target and options. constants: whole numbers among its compile-time arguments.
        registers: per thread. spills: instructions (on AMD: registers) that move registers to local memory.
        shared: bytes of shared memory. tensor_cores: instructions, by name.
        loop: instructions of the innermost loop with the most tensor-core instructions, of the longest one
            where there is none; 0 without a loop.
    """

    kernel: str
    target: str
    digest: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loop: int
    tensor_cores: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


class _AbsentDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # kernels keep what they compiled by this name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(name: str) -> Iterator[list[MachineCode]]:
    """Within the block, launches compile for the target of this name and are noted in the list, once each.

    Raises RuntimeError in a process that interprets kernels.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    target, found, seen = TARGETS[name], [], set()
    launch = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found.append(_examined(compiled, kernel, name))
        return compiled

    with (
        mock.patch.object(driver, "_active", _AbsentDevice(target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield found


def _examined(compiled: Any, kernel: JITFunction, target: str) -> MachineCode:
    metadata = compiled.metadata
    facts = _nvidia_facts(compiled.asm) if "cubin" in compiled.asm else _amd_facts(compiled.asm["amdgcn"])
    constants = {
        kernel.arg_names[path[0]]: value
        for path, value in compiled.src.constants.items()
        if kernel.params[path[0]].is_constexpr and isinstance(value, int)
    }
    return MachineCode(
        kernel=kernel.__name__,
        target=target,
        digest=compiled.hash[:16],
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared=metadata.shared,
        constants=constants,
        **facts,
    )


def _nvidia_facts(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        sass = _output("nvdisasm", "-c", file.name)
    names, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _SASS_LINE.match(line):
            names.append(instruction[2])
            if instruction[2].startswith("BRA") and (goal := re.search(r"`\((\.L_x_\d+)\)", instruction[3])):
                start = labels.get(goal[1], len(names))
                if start < len(names) - 1:  # every kernel ends in a branch to itself
                    loops.append(range(start, len(names)))
    return {
        "registers": max(int(number) for number in re.findall(r"REG:(\d+)", usage)),
        "spills": sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        "instructions": sum(name != "NOP" for name in names),
        "loop": _hottest(loops, names),
        "tensor_cores": _tensor_cores(names),
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _hottest(loops: list[range], names: list[str]) -> int:
    innermost = [
        loop
        for loop in loops
        if not any(loop.start <= other.start and other.stop < loop.stop for other in loops if other != loop)
    ]
    sizes = [(sum(bool(TENSOR_CORES.match(names[i])) for i in loop), len(loop)) for loop in innermost]
    return max(sizes, default=(0, 0))[1]


def _amd_facts(assembly: str) -> dict[str, Any]:
    counts = {key: int(value) for key, value in re.findall(r"\.(\w+_(?:spill_)?count):\s+(\d+)", assembly)}
    names = re.findall(r"^\t([a-z]+_\w+)", assembly, re.MULTILINE)
    return {
        "registers": counts.get("vgpr_count", 0),  # accumulation registers included
        "spills": counts.get("vgpr_spill_count", 0) + counts.get("sgpr_spill_count", 0),
        "instructions": len(names),
        "loop": 0,
        "tensor_cores": _tensor_cores(names),
    }


def _tensor_cores(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.split(".")[0] for name in names if TENSOR_CORES.match(name)))
