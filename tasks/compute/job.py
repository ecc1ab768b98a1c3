"""`python -m tasks.compute.job STAGE [--inputs]`: what a job does on its node.

It fetches what the stage reads from the DVC remote, has the same bridge run the stage as on any
other machine, and sends the outputs and the run-cache back. There is no Git here:
`core.no_scm` is set.

Who it is to the remote is the identity of the cluster, which adlfs asks for by
`DefaultAzureCredential`: give the cluster a managed identity (`az ml compute create
--identity-type SystemAssigned`) and that the role Storage Blob Data Contributor on the remote's
account. No key is in the job. A remote that is a folder is taken for one that the node sees, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.stage import die_with_parent
from tasks import bridge, remote

LIMIT_SECONDS = 30 * 86400.0  # the job has a time limit of its own


def main(stage: str, inputs: bool) -> None:
    """Run one stage here and keep in the remote what it made.

    Raises:
        StageFailed: with the stage's last words.
        UserError: the remote is not reached from here.
    """
    root = Path.cwd()
    if inputs:
        remote.pull(root, [stage])
    bridge.reproduce(root, stage, lambda line: print(line, flush=True), LIMIT_SECONDS)
    remote.push(root, [stage])


def stop(number: int, frame: Any) -> None:
    """End, and let `tasks.command` end what the stage started."""
    sys.exit(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGTERM, stop)  # a job is cancelled
    parser = argparse.ArgumentParser(prog="python -m tasks.compute.job")
    parser.add_argument("stage")
    parser.add_argument("--inputs", action="store_true", help="it reads what the remote has")
    given = parser.parse_args()
    if identity := os.environ.get("DEFAULT_IDENTITY_CLIENT_ID"):  # of a user-assigned identity
        os.environ.setdefault("AZURE_CLIENT_ID", identity)
    try:
        main(given.stage, given.inputs)
    except bridge.StageFailed as error:
        sys.exit(str(error))
    except UserError as error:
        sys.exit(f"{given.stage}: on the cluster: {error}")
