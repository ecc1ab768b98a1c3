"""`prefect`, but for a server that asks no other machine: `python -m tasks.prefect_server ...`.

A server of Prefect's looks the kinds of workers up on GitHub when one of them starts, and takes the
list that it carries when it gets no answer. There is no setting for it.
"""

from __future__ import annotations

from prefect.cli import app
from prefect.server.api import collections

# An address that is none: the list that is here is taken.
collections.KNOWN_VIEWS = dict.fromkeys(collections.KNOWN_VIEWS, "")

if __name__ == "__main__":
    app()
