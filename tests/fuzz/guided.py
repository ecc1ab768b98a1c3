"""`python -m tests.fuzz.guided rows --seconds 60`: cases led by what of the code they reach.

Atheris (https://github.com/google/atheris) keeps a case that reached a new branch and goes on from
it, where `python -m tests.fuzz` changes good files by chance. It is not in the lock: pip install
atheris==3.0.0. Ends with the case where `tests.fuzz` would.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does, for conftest

with atheris.instrument_imports(include=["stages", "tasks", "json", "yaml"]):
    from tests.fuzz.harness import SECONDS, holds
    from tests.fuzz.targets import TARGETS

FIRST = 60  # good and spoilt files to begin with
BYTES = 4096  # of a case


def main() -> int:
    """Read cases until the time is over; exit code 1 if one of them fails."""
    names = [name for name, target in TARGETS.items() if target.extremes]  # whose cases are bytes
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("reader", choices=names)
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args()
    target = TARGETS[args.reader]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        folder, work = Path(root, "in", args.reader), Path(root, "work")
        corpus = Path(root, "corpus")
        for one in (folder, work, corpus):
            one.mkdir(parents=True)
        if child := os.fork():  # libFuzzer ends its process, and would leave the folder behind
            return int(os.waitpid(child, 0)[1] != 0)
        target.prepare(folder)
        warnings.simplefilter("ignore")  # Hypothesis's, of `example`
        for number in range(FIRST):
            (corpus / str(number)).write_bytes(target.cases.example())

        def read(case: bytes) -> None:
            with contextlib.redirect_stdout(None), contextlib.chdir(work):
                holds(target, folder, case)

        limits = f"-max_total_time={args.seconds}", f"-timeout={SECONDS:.0f}", f"-max_len={BYTES}"
        atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(corpus)], read)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
