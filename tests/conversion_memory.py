"""Converts a checkpoint and prints how much memory that took, as JSON: run by tests, in a process of its own.

    python conversion_memory.py WARMUP SOURCE DESTINATION stream | load

`load` does it as Transformers does, with the whole model in memory. WARMUP is a tiny checkpoint that is
converted first, so that what is imported on the way is not counted.
"""

import json
import sys
import threading
from pathlib import Path

import torch

from msa_hf import MSAForCausalLM
from msa_hf.conversion import convert


def status(name):
    """Bytes, from the kernel's account of this process: VmRSS, VmHWM, RssAnon ..."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def load(source, destination):
    MSAForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(destination)


def main(warmup, source, destination, way):
    torch.set_num_threads(1)
    work = {"stream": convert, "load": load}[way]
    work(warmup, Path(destination) / "warmup")
    before = {name: status(name) for name in ("VmRSS", "RssAnon")}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    highest, done = 0, threading.Event()

    def sample():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    work(source, Path(destination) / "result")
    done.set()
    sampler.join()
    growth = {"anonymous": highest - before["RssAnon"], "resident": status("VmHWM") - before["VmRSS"]}
    print(json.dumps(growth))


if __name__ == "__main__":
    main(*sys.argv[1:])
