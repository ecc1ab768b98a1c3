"""A copy of the project in which the whole lab is run, and what tests ask of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from conftest import REPO, sh, typed

STAGES = [
    *("toolchain", "fetch", "prepare@travel", "quantize", "measure", "finetune@travel"),
    *("export", "convert@travel", "evaluate@travel", "package"),
]


def copy_project(folder: Path) -> Path:
    """What Git tracks or would track, in a new repository with one commit: a fresh clone."""
    listed = sh("git", "ls-files", "-co", "--exclude-standard", cwd=REPO).stdout.split("\n")
    for name in filter(None, listed):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    commit(folder, "start")
    return folder


def commit(folder: Path, message: str) -> None:
    sh("git", "init", "--quiet", cwd=folder)
    sh("git", "add", "--all", cwd=folder)
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    sh("git", *who, "commit", "--quiet", "--allow-empty", "-m", message, cwd=folder)


def olivepress(folder: Path, *args: str, api: str | None = None) -> Any:
    """Run the command and read its JSON."""
    env = {"PREFECT_API_URL": api} if api else {}
    done = typed(*args, "--json", cwd=folder, **env)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def run(folder: Path, api: str, *args: str) -> dict[str, str]:
    """`olivepress run`: each stage's state."""
    report = olivepress(folder, "run", *args, api=api)
    return {row["stage"]: row["state"] for row in report["stages"]}


def stale(folder: Path) -> set[str]:
    """The stages that `olivepress status` does not call up to date."""
    needs = olivepress(folder, "status")
    return {name for name, need in needs.items() if need["action"] != "unchanged"}


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(Path(parent, name).relative_to(folder)): hashlib.sha256(
            Path(parent, name).read_bytes()
        ).hexdigest()
        for parent, _, names in os.walk(folder)
        for name in names
    }
