"""Make a package again from the commit that its lineage names, with an empty cache, and compare."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages import bom, params, sums
from stages.errors import UserError
from stages.package import TRACE, volatile
from stages.stage import PACKAGE, killed_with_parent, of_time, read_json
from stages.sums import SUMS
from tasks import store
from tasks.command import Job
from tasks.pipeline import site_cache
from tasks.pool.workspace import FOLDER, have_own_cache, remove, workspace

BEGUN = re.compile(r"Running stage '(.+)':")
COMMIT = re.compile(r"[0-9a-f]{40}")


def differences(
    root: Path, folder: Path, record: dict[str, Any], on_line: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """(file, what differs) for each file that does not come out as it is in `folder`.

    README.md, times and speeds are left out: they say how it went, which is never the same twice.

    Args:
        root: the project, a Git repository that has the commit or can fetch it.
        folder: the package.
        record: what its lineage says of the stage `package`.
        on_line: called with each line that the stages print.

    Raises:
        UserError: it was not made from a commit; a stage fails.
    """
    commit = str(record["git_commit"])
    if not COMMIT.fullmatch(commit):
        raise UserError("names no commit to make it again from")
    if record["git_dirty"]:
        raise UserError(
            f"made from files that differ from commit {commit[:12]}: commit them, and run again"
        )
    for left in (root / FOLDER).glob("rebuild-*"):  # of one that was killed
        if not store.alive(int(left.name.rpartition("-")[2])):
            remove(root, left)
    with workspace(root, commit, f"rebuild-{os.getpid()}") as scratch:
        have_own_cache(scratch)
        _reproduce(scratch, on_line)
        yield from compare(scratch / PACKAGE, folder)


def _reproduce(folder: Path, on_line: Callable[[str], None]) -> None:
    """`dvc repro package`, which ends with this process.

    Raises:
        UserError: with the last words of the stage that failed.
    """
    limit = params.load(folder / "params.yaml").run.time_limit_minutes * 60
    job = Job(on_line, limit, {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": site_cache(folder)})
    command = ["dvc", "repro", "package"]
    if job.run(command, dict(os.environ), cwd=folder, preexec_fn=killed_with_parent):
        begun = [match[1] for match in map(BEGUN.match, job.lines) if match]
        raise UserError(f"could not be made again: {job.last_words((begun or ['dvc'])[-1])}")


def compare(made: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The files of a package that differ from those of the same package made anew."""
    new, old = sums.check(made).files, sums.check(folder).files
    for name in sorted((new.keys() | old) - {SUMS}):
        if name not in new or name not in old:
            yield name, "was not made again" if name in old else "is only made when made again"
        elif new[name].sha256 != old[name].sha256 and (not volatile(name) or name == bom.BOM):
            yield name, "comes out otherwise when it is made again"
        elif name.startswith("metrics/") and _figures(made / name) != _figures(folder / name):
            yield name, "its figures come out otherwise when it is made again"
    ours, theirs = read_json(made / TRACE), read_json(folder / TRACE)
    for stage in (stage for stage in ours if _lasting(ours[stage]) != _lasting(theirs.get(stage))):
        yield TRACE, f"{stage}: inputs, parameters or outputs are others when it is made again"


def _figures(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(path).items() if key != "speed"}


def _lasting(entry: dict[str, Any] | None) -> dict[str, Any]:
    """What a stage read and made, without the files that say when and how fast."""
    entry = entry or {}

    def lasting(digests: dict[str, str]) -> dict[str, str]:
        return {path: md5 for path, md5 in digests.items() if not of_time(path)}

    return {
        "cmd": entry.get("cmd"),
        "params": entry.get("params"),
        "deps": lasting(entry.get("deps", {})),
        "outs": lasting(entry.get("outs", {})),
    }
