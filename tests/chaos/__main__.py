"""`python -m tests.chaos --kills 100 --seed 1`: kill, mend, compare, with a row for each kill.

The clone stays in its folder, so that `--start` goes on where an earlier command stopped. Every row
is appended to FOLDER.jsonl, and `--table` prints what is known of them all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for conftest and lab

from tests.chaos import kills
from tests.chaos.clone import Clone

COLUMNS = ("#", "run by", "killed", "after s", "which was", "mended in s", "then")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> int:
    """Exit code 1 if after any kill something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=1, help="number of the first")
    parser.add_argument("--count", type=int, help="how many now; default: to the last")
    parser.add_argument("--kind", choices=["quick", "real"], default="real")
    parser.add_argument("--folder", type=Path, help="default: /tmp/chaos-KIND")
    parser.add_argument("--table", action="store_true", help="print what is known, kill nothing")
    args = parser.parse_args()
    folder: Path = (args.folder or Path(f"/tmp/chaos-{args.kind}")).resolve()
    os.environ["DVC_SITE_CACHE_DIR"] = f"{folder}.dvc-site"  # apart from the user's
    known = Path(f"{folder}.jsonl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `timeout` ends it: clean up
    if not args.table:
        clone = Clone(folder, args.kind)
        print(HEAD, flush=True)
        last = min(args.kills, args.start + (args.count or args.kills) - 1)
        try:
            for number in range(args.start, last + 1):
                one = kills.kill(clone, args.seed, number)
                print(kills.line(one), flush=True)
                with known.open("a") as file:
                    file.write(kills.as_json(one) + "\n")
        finally:
            clone.close()
    rows = [json.loads(text) for text in known.read_text().splitlines()]
    survived = Counter((row["driver"], row["victim"]) for row in rows if not row["wrong"])
    for (driver, victim), count in sorted(
        Counter((r["driver"], r["victim"]) for r in rows).items()
    ):
        print(f"{driver:<8} {victim:<8} {survived[driver, victim]} of {count}")
    print(f"{sum(survived.values())} of {len(rows)} kills survived")
    return int(sum(survived.values()) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
