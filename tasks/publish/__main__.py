"""`python -m tasks.publish REQUEST`: publish in a process of its own, which can be stopped.

REQUEST is the JSON of a `Request`. Prints progress lines in bytes, then `result` and the JSON of
what was done; exits 1 with one message on standard error for a user's mistake.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from stages import blobs
from stages.errors import UserError
from stages.stage import die_with_parent
from tasks.publish import content, targets
from tasks.publish.request import RESULT, Request


def main(request: Request) -> targets.Published:
    """Read the package, ask the target, and add it there if need be."""
    root = Path.cwd()
    package = content.read(root)
    target = open_target(request, root)
    return targets.publish(
        package, target, request.name, request.version, blobs.shown(package.size)
    )


def open_target(request: Request, root: Path) -> targets.Target:
    """The place that a request names."""
    if request.to == "azureml":
        from tasks.publish.azureml import AzureML

        return AzureML(request.place)
    if request.folder:
        from tasks.publish.folder import Folder

        return Folder(root / request.folder)
    from tasks.publish.mlflow import Mlflow

    return Mlflow(request.tracking_uri or os.environ["MLFLOW_TRACKING_URI"])


if __name__ == "__main__":
    die_with_parent()
    try:
        print(RESULT + json.dumps(asdict(main(Request.from_json(sys.argv[1])))))
    except UserError as error:
        sys.exit(f"publish: {error}")
