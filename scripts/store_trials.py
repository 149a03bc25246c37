"""Tries to break a MemoryStore: kills its process, lets its disk fail, damages its files. Prints a JSON line.

    python scripts/store_trials.py crashes --times 200
    python scripts/store_trials.py faults            # needs a C compiler; --short tries some of the calls
    python scripts/store_trials.py damage --files 50000
    python scripts/store_trials.py hostile           # databases that somebody made on purpose

The exit status is 1 if anything was lost, torn, crashed, hung or raised as an untyped error.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from msa_hf.evaluation import store_crashes, store_damage, store_faults, store_hostility


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trial", choices=("crashes", "faults", "damage", "hostile"))
    parser.add_argument("--times", type=int, default=200, help="how many kills (default 200)")
    parser.add_argument("--files", type=int, default=50_000, help="how many damaged stores (default 50000)")
    parser.add_argument("--seconds", type=float, help="damage no more files after so many seconds")
    parser.add_argument("--short", action="store_true", help="a few of the faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the stores; best in RAM (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.trial == "crashes":
            report = store_crashes.kill_often(options.times, folder, options.seed)
        elif options.trial == "faults":
            report = store_faults.fail_preloaded(folder, not options.short, options.seed)
        elif options.trial == "damage":
            report = store_damage.damage_often(options.files, folder, options.seed, options.seconds)
        else:
            report = store_hostility.try_hostile(folder)
    print(json.dumps(vars(report)))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
