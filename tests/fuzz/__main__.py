"""`python -m tests.fuzz --cases 100000`: the long run, and what it counted.

The cases are shared out over the readers, slow ones getting fewer. Ends with exit code 1, and a
case that does it, when a reader raises anything but a UserError, takes too long or too much memory,
or writes outside its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does, for conftest

from tests.fuzz.harness import run
from tests.fuzz.targets import TARGETS

NEAR = 19  # neighbours of each case


def tell(name: str, error: BaseException) -> None:
    """What a reader raised, where, and for which case, without the pages that one may fill."""
    for one in error.exceptions if isinstance(error, BaseExceptionGroup) else [error]:
        for line in traceback.format_tb(one.__traceback__)[-3:]:
            print(line.rstrip())
        print(f"{name}: {type(one).__name__}: {str(one)[:300]}")
        for note in getattr(one, "__notes__", []):
            print(f"  {note[:600]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="to repeat a run")
    parser.add_argument("--only", nargs="+", choices=TARGETS, help="readers, with their share each")
    args = parser.parse_args()
    shares = sum(target.share for target in TARGETS.values())
    total, failed = 0, []
    print(f"seed {args.seed}")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for name in args.only or TARGETS:
            began = time.monotonic()
            cases = round(args.cases * TARGETS[name].share / shares)
            try:
                with contextlib.redirect_stdout(None):  # a stage's progress
                    done = run(
                        name, TARGETS[name], Path(folder), cases, number=args.seed, near=NEAR
                    )
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of Rust is no Exception
                tell(name, error)
                failed.append(name)
                continue
            total += done
            print(f"{name:<22}{done:>9,} cases {time.monotonic() - began:>8.1f} s", flush=True)
    print(f"{total:,} cases, {len(failed)} readers failed {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
