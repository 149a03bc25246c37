"""The benchmark of the kernels, rehearsed with tiny shapes under the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))

import sweep  # noqa: E402
from results import Bar, Result  # noqa: E402
from timing import Ceilings, Timing  # noqa: E402

from msa_hf.kernels import launch  # noqa: E402


def run(*options):
    command = [sys.executable, ROOT / "kernels" / "benchmarks" / "benchmark.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_rehearsal(tmp_path):
    """Every measurement runs, agrees with its twin and names its peers; no time is reported."""
    done = run("--interpret", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rehearsal"] and "rehearsal" in done.stdout
    names = " ".join(result["name"] for result in report["results"])
    parts = "decode, 1 x 128k, 4 bits|2.7 bits|1.8 bits|prefill|route|encode|gather|pool|of a model"
    for part in parts.split("|"):
        assert part in names
    for result in report["results"]:
        assert result["right"] and result["peers"]
        assert result["error"] is not None or "of a model" in result["name"]
        assert f"{result['ours']['median']:.4g} (" not in done.stdout


def test_result_against_ceilings_peers_and_bars():
    ours, peer = Timing(2.0, 1.9, 2.2, graph=True), Timing(5.0, 5.0, 5.0, graph=False)
    result = Result("case", 1e-4, 1e-3, ours, nbytes=10**9, flops=10**9, peers={"SDPA Flash": peer})
    result.bars = [Bar("speed", result.ratio("SDPA"), 2.0), Bar("time", ours.median, 1.0, at_most=True)]
    ceilings = Ceilings(copy=1e12, matmul=2e12)
    assert result.ratio("SDPA") == 2.5 and result.ratio("cuDNN") == 0
    assert result.of_copy(ceilings) == pytest.approx(0.5)
    assert result.of_matmul(ceilings) == pytest.approx(0.25)
    assert [bar.met for bar in result.bars] == [True, False]
    assert "| 50% | 25% | 2.50 x SDPA Flash |" in result.row(ceilings, rehearsal=False)
    data = json.loads(json.dumps(result.to_dict(ceilings)))
    assert data["ratios"] == {"SDPA Flash": 2.5} and data["bytes_per_second"] == pytest.approx(5e11)


def test_wrong_result_is_said_and_not_timed():
    result = Result("case", error=float("inf"), tolerance=1e-3)
    assert not result.right
    assert "WRONG" in result.summary()
    assert "**inf**" in result.row(Ceilings(1.0, 1.0), rehearsal=False)
    assert result.ratio("SDPA") == 0


class FakeStopwatch:
    """Says how long the parameters in force take."""

    device = torch.device("cpu")

    def time(self, calls):
        found = launch.launch_parameters("decode_attention", self.device)
        if found["num_warps"] > 8:
            raise RuntimeError("out of resources")
        took = abs(found["ROWS"] - 64) + abs(found["num_warps"] - 8) + found["num_stages"]
        return Timing(1.0 + took, 0.0, 0.0, graph=True)


def test_sweep_finds_the_best_parameters(monkeypatch):
    start = {"ROWS": 16, "num_warps": 2, "num_stages": 4}
    monkeypatch.setitem(launch.PARAMETERS, "decode_attention", {(0, 0): start})
    found = sweep.best_parameters("decode_attention", [], FakeStopwatch())
    assert found["parameters"] == {"ROWS": 64, "num_warps": 8, "num_stages": 1}
    assert found["before_ms"] == 59 and found["after_ms"] == 2
    assert launch.PARAMETERS["decode_attention"] == {(0, 0): start}
    assert set(sweep.WORKLOADS) <= set(launch.PARAMETERS)
