"""Every figure of docs/quality.md.

    python benchmarks/quality.py quantizers MODEL --calibration TEXT --test TEXT
    python benchmarks/quality.py exports MODEL --calibration TEXT --test TEXT
    olivepress run && python benchmarks/quality.py healing

Tables go to standard output, all else to standard error.
"""

from __future__ import annotations

import sys

import exports
import healing
import quantizers

PARTS = {"quantizers": quantizers.main, "exports": exports.main, "healing": healing.main}


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part not in PARTS:
        sys.exit(__doc__)
    PARTS[part](sys.argv[2:])


if __name__ == "__main__":
    main()
