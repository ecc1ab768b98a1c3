"""The flow for a schedule: bring this clone up to date, and run what that made stale."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.optimize import optimize
from stages.errors import UserError
from tasks import alive, bridge, remote
from tasks.command import Job
from tasks.dvc_command import Dvc
from tasks.git import git, succeeds
from tasks.turn import Busy, alone

FETCH_SECONDS = 120.0
STATUS_SECONDS = 3600.0  # it reads every byte of data that is new
LOCK = "dvc.lock"


@flow(name="refresh", log_prints=False, persist_result=False)
def refresh(pull: bool = True) -> Any:
    """Run `optimize` if there is something for it to do.

    What the network does not give is a warning in the log: what is here is looked at all the same.

    Args:
        pull: first bring the branch up to its upstream, and fetch data that `.dvc` files name.

    Returns:
        Completed with "nothing changed" and no task run, or the state of `optimize`.
    """
    logger = get_run_logger()
    try:
        root = bridge.find_root()
        alive.here(root)
        with alone(root, "a refresh"):  # files must not change under a stage
            for failing, step in STEPS.items() if pull else ():
                try:
                    for line in step(root):
                        logger.info(line)
                except UserError as error:
                    logger.warning("%s: %s", failing, error)
        needs = bridge.status(root)
    except Busy:
        return Completed(message="another run is at work in this clone; the next poll looks")
    except UserError as error:
        return Failed(message=str(error))
    stale = [
        f"{name}: {'; '.join(need.reasons)}"
        for name, need in needs.items()
        if need.action != "unchanged"
    ]
    if not stale:
        return Completed(message="nothing changed")
    for line in stale:
        logger.info("stale: %s", line)
    done: State = optimize(return_state=True)  # type: ignore[assignment]
    if not done.is_completed():
        return Failed(message=done.message)
    return Completed(message=stale[0] + (f"; {len(stale) - 1} more" if stale[1:] else ""))


def pull_commits(root: Path) -> list[str]:
    """Bring the branch up to its upstream; what there is to say of it.

    Files that are changed here stop it, but for dvc.lock, which every run writes: where the
    upstream has another, that one is taken, and DVC's cache still knows what was run here.

    Raises:
        UserError: why it was not done.
    """
    if not succeeds(root, "rev-parse", "@{upstream}"):
        return ["no upstream to pull from"]
    fetch_commits(root)
    differs = ("diff", "--name-only", "--relative")
    theirs = git(root, *differs, "HEAD...@{upstream}").splitlines()
    added = git(root, *differs, "--diff-filter=A", "HEAD...@{upstream}").splitlines()
    changed = git(root, *differs, "HEAD").splitlines()
    changed += [path for path in added if (root / path).exists()]
    if others := [path for path in changed if path != LOCK]:
        names = ", ".join(others[:3]) + (", …" if others[3:] else "")
        raise UserError(f"files are changed here: {names}; commit or restore them")
    before = git(root, "rev-parse", "HEAD")
    kept = (root / LOCK).read_bytes() if LOCK in theirs and LOCK in changed else None
    if kept is not None:
        (root / LOCK).unlink()
    try:
        git(root, "merge", "--quiet", "--ff-only", "@{upstream}")
    except UserError:
        if kept is not None:
            (root / LOCK).write_bytes(kept)
        raise
    return [f"pulled {it}" for it in git(root, "log", "--format=%h %s", f"{before}..").splitlines()]


def fetch_commits(root: Path) -> None:
    """`git fetch`, with a time limit and without a terminal to ask for a password.

    Raises:
        UserError: git's last words.
    """
    job = Job(lambda line: None, FETCH_SECONDS, {"GIT_TERMINAL_PROMPT": "0"})
    job.run(["git", "fetch", "--quiet"], dict(os.environ), cwd=root)
    if words := job.last_words("git fetch"):
        raise UserError(words)


def fetch_data(root: Path) -> list[str]:
    """Fetch data that `.dvc` files name and that is not here; what there is to say of it.

    Raises:
        UserError: there is no remote, or it did not give them.
    """
    dvc = Dvc(root, "dvc", STATUS_SECONDS, STATUS_SECONDS, lambda done, total, note: None)
    found = json.loads(dvc.do("status", "--json")[-1])
    wanted = [name for name, changes in found.items() if _wanted(root, name, changes)]
    if not wanted:
        return []
    moved = remote.pull(root, wanted)
    return [f"data of {', '.join(wanted)}: {moved.files} files fetched from {moved.url}"]


def _wanted(root: Path, name: str, changes: list[Any]) -> bool:
    """Whether a `.dvc` file's data is missing, or older than it: a commit named other content.

    Data that is newer was put there by a person, and is what the stages are to read.
    """
    if not name.endswith(".dvc"):
        return False
    named = (root / name).stat().st_mtime
    outs = [out for it in changes if isinstance(it, dict) for out in it.get("changed outs", {})]
    paths = [root / out for out in outs]
    return any(not path.exists() or path.stat().st_mtime < named for path in paths)


STEPS = {"not pulled": pull_commits, "data not fetched": fetch_data}

if __name__ == "__main__":
    refresh()
