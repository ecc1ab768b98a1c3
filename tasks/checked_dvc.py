"""The command `dvc`, with what `tasks.store` puts right in it: names and hashes are not believed.

Run as a file: DVC notes its command line with what it holds, and `tasks.locks` looks for that.
"""

from __future__ import annotations

import sys

from dvc.cli import main

from tasks import store  # noqa: F401

if __name__ == "__main__":
    sys.exit(main())
